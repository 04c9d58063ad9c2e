"""Changes of one line after which pictures look plausible still, and are those of another method."""

from tests.mutation.named import Named

SAMPLER = "fitv2_scale/evaluate/sampling/sampler.py"
DENOISING = "fitv2_scale/evaluate/sampling/denoising.py"
GUIDANCE = "tests/fitv2_scale/evaluate/sampling/test_guidance.py"
DENOISED = "tests/fitv2_scale/evaluate/sampling/test_denoising.py"

OF_SAMPLING = (
    Named(
        "no guidance at the noisy end of its interval", SAMPLER,
        "return (t_I >= first) &",
        "return (t_I > first) &",
        (f"{GUIDANCE}::test_the_interval_of_a_flow",),
    ),
    Named(
        "guidance at the clean end of its interval", SAMPLER,
        "(t_I < last) if last < 1",
        "(t_I <= last) if last < 1",
        (f"{GUIDANCE}::test_the_interval_of_a_flow",),
    ),
    Named(
        "no guidance at t = 1 by default", SAMPLER,
        "(t_I < last) if last < 1",
        "(t_I < last) if last <= 1",
        (f"{GUIDANCE}::test_the_interval_of_a_flow",),
    ),
    Named(
        "guidance within the interval of the first image of a pack", SAMPLER,
        "self._within_interval(t_I)[",
        "self._within_interval(t_I[:1].expand_as(t_I))[",
        (f"{GUIDANCE}::test_the_interval_is_at_the_times_of_each_image",),
    ),
    Named(
        "the interval of a ddpm from data to noise", SAMPLER,
        "(1 - t_I.double() / DDPM_LEVELS).float()",
        "(t_I.double() / DDPM_LEVELS).float()",
        (f"{GUIDANCE}::test_the_interval_and_the_channels_of_ddim",),
    ),
    Named(
        "the interval of a ddpm in float32", SAMPLER,
        "(1 - t_I.double() / DDPM_LEVELS).float()",
        "(1 - t_I / DDPM_LEVELS).float()",
        (f"{GUIDANCE}::test_the_interval_and_the_channels_of_ddim",),
    ),
    Named(
        "guidance of the variance", SAMPLER,
        "self._guided = self._channels if",
        "self._guided = 2 * self._channels if",
        (f"{GUIDANCE}::test_ancestral_noise_is_keyed_and_the_variance_is_of_the_conditional_pass",),
    ),
    Named(
        "two latent channels guided instead of three", SAMPLER,
        "else 3 * model.patch**2",
        "else 2 * model.patch**2",
        (f"{GUIDANCE}::test_the_interval_and_the_channels_of_ddim",),
    ),
    Named(
        "the noise of the first step is the start's", SAMPLER,
        "lambda k: noise(k + 1)",
        "lambda k: noise(k)",
        (f"{GUIDANCE}::test_ancestral_noise_is_keyed_and_the_variance_is_of_the_conditional_pass",),
    ),
    Named(
        "ddpm weights sampled as a flow", SAMPLER,
        "require_fitting(sampling.solver, objective)",
        "pass",
        (f"{GUIDANCE}::test_a_solver_for_another_objective_is_refused",),
    ),
    Named(
        "ddim ends at level 0 instead of the image", DENOISING,
        "schedule.alpha_bar_before_K[i].item()",
        "schedule.alpha_bar_K[max(i - 1, 0)].item()",
        (DENOISED,),
    ),
    Named("noise in the last step", DENOISING, "if i > 0:", "if i >= 0:", (DENOISED,)),
    Named("v taken for the share of beta", DENOISING, "(v_NC + 1) / 2 *", "v_NC *", (DENOISED,)),
    Named(
        "the deviation of a step is its variance", DENOISING,
        "return exp(least / 2)",
        "return exp(least)",
        (DENOISED,),
    ),
)  # fmt: skip
