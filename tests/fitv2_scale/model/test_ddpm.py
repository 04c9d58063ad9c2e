"""DDPM: noised images, losses and gradients against the published formulas in float64, and who draws what."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fitv2_scale.config.model import DdpmConfig
from fitv2_scale.model.ddpm import Ddpm
from fitv2_scale.model.objective import ImageLosses, pack_loss
from fitv2_scale.model.packed_batch import PackedBatch
from tests.oracle.draws import gaussians, is_dropped, noise_of, words
from tests.support.tiny_networks import pack

SEED, EPOCH, CLASSES, CPU = 5, 3, 5, torch.device("cpu")
IDS, LABELS, SIZES = (55065681212735499, 55065681212735577, 7, 8), (1, 4, 2, 0), ((3, 4), (2, 2), (1, 3), (4, 4))
LEVELS = (589, 64)  # of the first two: 1000 times their words, 2532211939 and 276728766, over 2**32: 589.58, 64.43
VALIDATION_NOISE = 17
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def batch(tokens: int = 48, slots: int = 9) -> PackedBatch:
    """Four images, padding and slots without tokens. Some latents lie at the open ends of the bins."""
    generator = torch.Generator().manual_seed(3)
    used = sum(rows * columns for rows, columns in SIZES)
    latents_TC = torch.randn(used, 16, generator=generator)
    latents_TC[::5, 3], latents_TC[::7, 4] = -0.9995, 0.9995

    def per_image(values: tuple) -> Tensor:
        return torch.tensor([*values, *[0] * (slots - len(IDS))])

    return PackedBatch(
        latents_TC=torch.cat((latents_TC, torch.zeros(tokens - used, 16))),
        packing=pack(list(SIZES), tokens, slots, 16),
        label_I=per_image(LABELS),
        weight_I=per_image((0.25,) * 4).float(),
        sample_id_I=per_image(IDS),
        epoch_I=per_image((EPOCH,) * 4),
    )


def ddpm(seed: int = SEED, dropout: float = 0.1) -> Ddpm:
    return Ddpm(DdpmConfig(label_dropout=dropout), CLASSES, seed, CPU)


def slices() -> list[slice]:
    ends = np.cumsum([0, *(rows * columns for rows, columns in SIZES)]).tolist()
    return [slice(start, end) for start, end in zip(ends[:-1], ends[1:], strict=True)]


def at_levels(levels: tuple[int, ...]) -> Tensor:
    """The places of a grid that validate at ``levels``."""
    return torch.tensor([1 - (t + 0.5) / 1000 for t in (*levels, *[500] * 5)], dtype=torch.float64)


def cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def published(x0: Tensor, noise: Tensor, output: Tensor, t: int) -> Tensor:
    """An image's loss, float64, as the papers' formulas have it."""
    betas = np.linspace(1e-4, 0.02, 1000)
    beta, bar, before = betas[t], ALPHA_BAR[t], ALPHA_BAR[t - 1] if t else 1.0
    tilde = betas[1] * (1 - ALPHA_BAR[0]) / (1 - ALPHA_BAR[1]) if t == 0 else beta * (1 - before) / (1 - bar)
    x_t = math.sqrt(bar) * x0 + math.sqrt(1 - bar) * noise
    mse = (noise - output[:, :16]).square()
    if output.shape[1] == 16:
        return mse.mean()
    x0_found = x_t / math.sqrt(bar) - math.sqrt(1 / bar - 1) * output[:, :16].detach()

    def mean(x: Tensor) -> Tensor:
        return beta * math.sqrt(before) / (1 - bar) * x + (1 - before) * math.sqrt(1 - beta) / (1 - bar) * x_t

    share = (output[:, 16:] + 1) / 2
    log_variance = share * math.log(beta) + (1 - share) * math.log(tilde)
    if t > 0:
        apart = (mean(x0) - mean(x0_found)).square() * torch.exp(-log_variance)
        bound = 0.5 * (-1 + log_variance - math.log(tilde) + torch.exp(math.log(tilde) - log_variance) + apart)
        return (mse + bound / math.log(2)).mean()
    centred, inverse = x0 - mean(x0_found), torch.exp(-0.5 * log_variance)
    upper, lower = cdf(inverse * (centred + 1 / 255)), cdf(inverse * (centred - 1 / 255))
    least = torch.tensor(1e-12, dtype=torch.float64)
    inside = torch.log(torch.maximum(upper - lower, least))
    highest, lowest = torch.log(torch.maximum(1 - lower, least)), torch.log(torch.maximum(upper, least))
    likelihood = torch.where(x0 < -0.999, lowest, torch.where(x0 > 0.999, highest, inside))
    return (mse - likelihood / math.log(2)).mean()


def losses_of(levels: tuple[int, ...], output_TC: Tensor) -> tuple[ImageLosses, Tensor]:
    """What a network loses that gives ``output_TC``, and the noise it was to find."""
    objective, pack_ = ddpm(), batch()
    noised = objective.validation_batch(pack_, at_levels(levels))
    assert noised.t_I[:4].tolist() == list(levels)
    return objective.losses(lambda *given: output_TC, noised, pack_), noised.target_TC


@pytest.mark.parametrize("levels", [(0, 1, 500, 999), (2, 0, 0, 250), (999, 998, 1, 3)])
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("near", [False, True])
def test_losses_and_gradients_are_the_published_ones(levels, width, near):
    """Mixed sizes in one pack. ``near``: the network has nearly found the noise, and the variance."""
    generator, pack_ = torch.Generator().manual_seed(1), batch()
    output_TC = torch.randn(48, width, generator=generator) * (0.05 if near else 1.0)
    if near:
        output_TC[:, :16] += ddpm().validation_batch(pack_, at_levels(levels)).target_TC
    found, noise_TC = losses_of(levels, output_TC.requires_grad_())
    expected_TC = output_TC.detach().double().requires_grad_()
    expected = [
        published(pack_.latents_TC[at].double(), noise_TC[at].double(), expected_TC[at], t)
        for at, t in zip(slices(), levels, strict=True)
    ]
    assert found.loss_I[:4].tolist() == pytest.approx([loss.item() for loss in expected], rel=1e-6)
    assert found.time_I[:4].tolist() == pytest.approx([1 - t / 1000 for t in levels], abs=1e-7)
    assert found.loss_I[6:].tolist() == [0, 0, 0]  # slots without tokens
    found.weighted_sum(pack_).backward()
    (sum(expected) / 4).backward()
    assert output_TC.grad is not None and expected_TC.grad is not None
    torch.testing.assert_close(output_TC.grad.double(), expected_TC.grad, rtol=1e-5, atol=1e-8)
    assert not output_TC.grad[35:].any()  # padding


def test_noise_learns_from_the_square_alone_and_the_variance_from_the_bound():
    """The gradient of the noise is 2 (e - noise) / (values of the image) x weight, whatever the bound."""
    torch.manual_seed(2)
    output_TC, levels = torch.randn(48, 32, requires_grad=True), (0, 1, 500, 999)
    found, noise_TC = losses_of(levels, output_TC)
    found.weighted_sum(batch()).backward()
    assert output_TC.grad is not None
    for at in slices():
        error = output_TC.detach()[at, :16] - noise_TC[at]
        torch.testing.assert_close(output_TC.grad[at, :16], error * 2 / error.numel() / 4, rtol=1e-6, atol=1e-10)
        assert output_TC.grad[at, 16:].abs().min() > 0


def test_a_step_that_is_the_posterior_has_no_bound():
    """All noise found and v = -1: both Gaussians are one. At v = 1 beta takes the place of the posterior's variance."""
    levels = (1, 500, 999, 10)
    noise_TC = ddpm().validation_batch(batch(), at_levels(levels)).target_TC
    for v, expected in ((-1.0, [0.0] * 4), (1.0, [kl_of_widths(t) for t in levels])):
        found, _ = losses_of(levels, torch.cat((noise_TC, torch.full_like(noise_TC, v)), -1))
        assert found.loss_I[:4].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def kl_of_widths(t: int) -> float:
    """Bits from the posterior to a Gaussian of variance beta about the same mean."""
    ratio = (1 - ALPHA_BAR[t - 1]) / (1 - ALPHA_BAR[t])
    return 0.5 * (ratio - 1 - math.log(ratio)) / math.log(2)


def test_levels_noise_and_labels_are_keyed():
    noised = ddpm().training_batch(batch())
    assert noised.t_I.dtype == torch.float32 and noised.t_I[:2].tolist() == list(LEVELS)
    assert noised.t_I[2:4].tolist() == [1000 * words(SEED, 2, EPOCH, number, 1)[0] >> 32 for number in IDS[2:]]
    for at, number, label, trained in zip(slices(), IDS, LABELS, noised.label_I.tolist(), strict=False):
        noise = noise_of(SEED, EPOCH, number, at.stop - at.start)
        np.testing.assert_allclose(noised.target_TC[at].numpy(), noise, rtol=0, atol=1e-6)
        assert trained == (CLASSES if is_dropped(SEED, EPOCH, number, 0.1) else label)
    assert noised.label_I[:2].tolist() == [5, 4]  # the first image's label is dropped, as in a flow
    assert ddpm(dropout=1.0).training_batch(batch()).label_I.tolist() == [5] * 9
    assert ddpm(seed=6).training_batch(batch()).t_I[:2].tolist() != list(LEVELS)
    for at, t in zip(slices()[:2], LEVELS, strict=True):
        clean, noise = batch().latents_TC[at].double(), noised.target_TC[at].double()
        expected = math.sqrt(ALPHA_BAR[t]) * clean + math.sqrt(1 - ALPHA_BAR[t]) * noise
        torch.testing.assert_close(noised.x_TC[at].double(), expected, rtol=1e-6, atol=1e-6)


def test_all_levels_are_trained_on_alike():
    from scipy import stats

    shape = pack([(1, 1)] * 4000, 4000, 4001, 1)
    ids, zeros = torch.arange(4001), torch.zeros(4001, dtype=torch.int64)
    t_I = ddpm().training_batch(PackedBatch(torch.zeros(4000, 16), shape, zeros, zeros.float(), ids, zeros)).t_I
    assert t_I.frac().eq(0).all() and t_I.min() >= 0 and t_I.max() <= 999
    assert stats.chisquare(np.bincount((t_I[:4000] // 50).long().numpy(), minlength=20)).pvalue > 1e-4


@pytest.mark.parametrize(
    "times,levels",
    [
        (1, [500]),
        (4, [875, 625, 375, 125]),
        (8, [937, 812, 687, 562, 437, 312, 187, 62]),
        (10, [950, 850, 750, 650, 550, 450, 350, 250, 150, 50]),
        (1000, [999 - k for k in range(1000)]),
    ],
)
def test_validation_goes_from_noise_to_the_image(times, levels):
    u = [(k + 0.5) / times for k in range(times)]
    found = []
    for start in range(0, times, 9):
        part = u[start : start + 9]
        u_I = torch.tensor([*part, *[0.5] * (9 - len(part))], dtype=torch.float64)
        noised = ddpm().validation_batch(batch(), u_I)
        found += noised.t_I[: len(part)].long().tolist()
        assert noised.label_I.tolist() == batch().label_I.tolist()  # none dropped
    assert found == levels


def test_the_noise_of_validation_is_that_of_seed_0():
    found = ddpm(seed=11).validation_batch(batch(), at_levels((10, 20, 30, 40))).target_TC
    for at, number in zip(slices(), IDS, strict=True):
        draws = words(0, VALIDATION_NOISE, EPOCH, number, 16 * (at.stop - at.start))
        np.testing.assert_allclose(found[at].numpy().ravel(), gaussians(draws), rtol=0, atol=1e-6)


def test_a_pack_without_images_has_no_loss():
    zeros = torch.zeros(3, dtype=torch.int64)
    empty = PackedBatch(torch.zeros(16, 16), pack([], 16, 3, 16), zeros, zeros.float(), zeros, zeros)
    output_TC = torch.randn(16, 32, requires_grad=True)
    loss = pack_loss(ddpm(), lambda *given: output_TC, empty)
    loss.backward()
    assert loss.item() == 0 and output_TC.grad is not None and not output_TC.grad.any()
