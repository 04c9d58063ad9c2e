"""Solvers of a network that was trained as a DDPM, from noise to data: ancestral sampling, and DDIM without noise.

The field gives for each token the predicted noise e and, if the network learns the variance, as many numbers v: (N, C)
or (N, 2 C). Its time is a level of the training, 0 to 999, where 999 is almost noise. State and results are as in
``solvers.py``; coefficients are float64 numbers.
"""

from collections.abc import Callable
from math import exp, log, sqrt

from torch import Tensor

from fitv2_scale.evaluate.sampling.solvers import Field, Images
from fitv2_scale.model.ddpm_schedule import DdpmSchedule


def ancestral(
    field: Field, x_NC: Tensor, images: Images, steps: int, noise: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    """DiT's ancestral sampling: from each of ``steps`` evenly spaced levels, x of the level before is drawn from a
    Gaussian, but for the last one, whose mean is the result.

    The mean is that of the posterior given x and the x0 that e implies, which is not clipped. The logarithm of the
    variance is the posterior's at v = -1 or without v, that of beta at v = 1, and linear in v. ``noise(k)`` is the
    standard normal of step k, (N, C). Returns as ``euler``.
    """
    schedule, channels = DdpmSchedule.respaced(str(steps)), x_NC.shape[1]
    for k in range(steps):
        i = steps - 1 - k
        alpha_bar, of_x0 = schedule.alpha_bar_K[i].item(), schedule.posterior_x0_K[i].item()
        output = field(x_NC, images.times(schedule.t_K[i].item()))
        # x0 = x / sqrt(alpha_bar) - sqrt(1 / alpha_bar - 1) e, without the large numbers that it has in between.
        of_x = of_x0 / sqrt(alpha_bar) + schedule.posterior_xt_K[i].item()
        x_NC = of_x * x_NC - of_x0 * sqrt(1 / alpha_bar - 1) * output[:, :channels]
        if i > 0:
            x_NC = x_NC + _deviation(schedule, i, output[:, channels:]) * noise(k)
    return x_NC, images.count(steps)


def _deviation(schedule: DdpmSchedule, i: int, v_NC: Tensor) -> Tensor | float:
    """The standard deviation of the step from level ``i`` of ``schedule``; without v, ``v_NC`` has no columns."""
    least = schedule.posterior_log_variance_K[i].item()
    if v_NC.shape[1] == 0:
        return exp(least / 2)
    return ((least + (v_NC + 1) / 2 * (log(schedule.beta_K[i].item()) - least)) / 2).exp()


def ddim(field: Field, x_NC: Tensor, images: Images, steps: int) -> tuple[Tensor, Tensor]:
    """DDIM (arXiv 2010.02502) with eta = 0, at ``steps`` levels in equal strides from level 0: x0 as e implies it, then
    x of the level before with the same e. Ends at x0. Returns as ``euler``."""
    schedule, channels = DdpmSchedule.respaced(f"ddim{steps}"), x_NC.shape[1]
    for i in reversed(range(steps)):
        alpha_bar, before = schedule.alpha_bar_K[i].item(), schedule.alpha_bar_before_K[i].item()
        e_NC = field(x_NC, images.times(schedule.t_K[i].item()))[:, :channels]
        scale = sqrt(before / alpha_bar)
        x_NC = scale * x_NC + (sqrt(1 - before) - scale * sqrt(1 - alpha_bar)) * e_NC
    return x_NC, images.count(steps)
