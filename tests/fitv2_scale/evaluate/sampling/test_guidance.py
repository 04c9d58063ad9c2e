"""Guidance with networks whose outputs are known numbers: where it applies, and to which channels."""

import numpy as np
import pytest
import torch
from torch import Tensor

from data_sharding import rng
from data_sharding.errors import UserError
from data_sharding.rng import Purpose
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.evaluate.sampling import sampler
from fitv2_scale.evaluate.sampling.sampler import ImageRequest, sample
from tests.support.alone import Alone

CLASSES = 5
MODEL = ModelConfig(depth=1, hidden=8, heads=1, classes=CLASSES)
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
REQUESTS = [ImageRequest(0, 3, 2, 3), ImageRequest(1, 2, 1, 1), ImageRequest(2, 4, 4, 1)]
CFG, WITHOUT = 3.0, -1.0


class Numbers:
    """The output of an image is its class, or -1 without one, times 1 in the first twelve channels and 2 in the others.

    With ``v`` there is a second half: ``v`` with a class, and minus 0.9 without one.
    """

    def __init__(self, factor: float = 1.0, v: float | None = None):
        self.factor, self.v = factor, v

    def __call__(self, x_TC, t_I, label_I, packing, rope) -> Tensor:
        free_T1 = (label_I == CLASSES)[packing.image_T][:, None]
        value_T1 = torch.where(free_T1, WITHOUT, label_I[packing.image_T][:, None].float())
        output_TC = self.factor * value_T1 * torch.tensor([1.0] * 12 + [2.0] * 4)
        if self.v is None:
            return output_TC
        return torch.cat((output_TC, torch.where(free_T1, -0.9, self.v).expand(-1, 16)), 1)


def draw(network, objective: str = "flow", requests=REQUESTS, **sampling) -> dict[ImageRequest, np.ndarray]:
    options = SamplingConfig(**{"cfg": CFG} | sampling)
    how = {"model": MODEL, "objective": objective, "sampling": options}
    made = sample(network, requests, **how, seed=7, world=Alone())
    return {request: one.tokens for request, one in made.items()}


def moved(objective: str = "flow", **sampling) -> dict[ImageRequest, np.ndarray]:
    """What the network adds to the result: solvers are linear in it, if it does not depend on x."""
    found, noise = draw(Numbers(), objective, **sampling), draw(Numbers(0.0), objective, **sampling)
    return {request: found[request] - noise[request] for request in REQUESTS}


def guided(label: int) -> float:
    return WITHOUT + CFG * (label - WITHOUT)


# Of the evaluations at these times, those that are guided: the noisy end is within the interval, the clean end is not,
# unless it is 1.
@pytest.mark.parametrize(
    "solver, steps, interval, within",
    [
        ("euler", 8, [0.0, 1.0], [1, 1, 1, 1, 1, 1, 1, 1]),  # at 0, 1/8, … 7/8
        ("euler", 8, [0.25, 0.75], [0, 0, 1, 1, 1, 1, 0, 0]),
        ("euler", 8, [0.0, 0.5], [1, 1, 1, 1, 0, 0, 0, 0]),
        ("euler", 10, [0.7, 0.9], [0, 0, 0, 0, 0, 0, 0, 1, 1, 0]),  # 7/10 in float32 is less than 0.7 in float64
        ("euler", 8, [0.3, 0.35], [0, 0, 0, 0, 0, 0, 0, 0]),
        ("heun", 2, [0.5, 1.0], [0, 1, 1, 1]),  # at 0, 1/2, 1/2, 1
        ("heun", 2, [0.5, 0.999], [0, 1, 1, 0]),
    ],
)
def test_the_interval_of_a_flow(solver, steps, interval, within):
    found = moved(solver=solver, steps=steps, guidance_interval=interval)
    for request, shift in found.items():
        mean = np.mean([guided(request.label) if one else request.label for one in within])
        np.testing.assert_allclose(shift[..., :12], mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(shift[..., 12:], 2 * mean, rtol=1e-5, atol=1e-5)


def test_the_interval_of_adaptive_steps():
    """Its share of the way, to about the tolerance, as the velocity jumps there."""
    for request, shift in moved(solver="dopri5", guidance_interval=[0.25, 0.75], atol=1e-5, rtol=1e-5).items():
        np.testing.assert_allclose(shift[..., 0], (guided(request.label) + request.label) / 2, rtol=1e-3)


def shaking(x_TC, t_I, label_I, packing, rope) -> Tensor:
    """A velocity that changes the faster, the higher the class is, and without class lies elsewhere."""
    rate_T, t_T = label_I.float()[packing.image_T], t_I[packing.image_T]
    return (torch.cos(2 * rate_T**2 * t_T) * rate_T)[:, None] * torch.tanh(x_TC + 1)


@pytest.mark.parametrize(
    "objective, solver, interval",
    [
        ("flow", "sde", [0.3, 0.7]),
        ("flow", "dopri5", [0.0, 1.0]),  # where the velocity jumps, rounding moves its steps
        ("ddpm", "ddpm", [0.3, 0.7]),
        ("ddpm", "ddim", [0.3, 0.7]),
    ],
)
def test_each_image_of_a_pack_is_as_it_is_alone(objective, solver, interval):
    how = {"solver": solver, "steps": 4, "guidance_interval": interval, "rtol": 1e-5}
    together = draw(shaking, objective, **how)
    for request in REQUESTS:
        alone = draw(shaking, objective, [request], **how)[request]
        np.testing.assert_allclose(together[request], alone, rtol=1e-4, atol=1e-4)


def test_the_interval_is_at_the_times_of_each_image(monkeypatch):
    """By a solver that asks once, at another time for each image, and returns the velocity."""

    def ask(field, x_NC, images, sampling, noise):
        return field(x_NC, torch.tensor([0.1, 0.5, 0.9])), images.count(1)

    monkeypatch.setattr(sampler, "SOLVE", {"dopri5": ask})
    found = draw(Numbers(), solver="dopri5", guidance_interval=[0.3, 0.7])
    for request, velocity in zip(REQUESTS, (3, guided(2), 4), strict=True):
        np.testing.assert_array_equal(found[request][..., :12], np.full((request.rows, request.columns, 12), velocity))


# Four steps are at the levels 750, 500, 250 and 0 of 1000, which are the flow times 1/4, 1/2, 3/4 and 1; five from 1/5.
@pytest.mark.parametrize(
    "interval, within",
    [
        ([0.0, 1.0], [1, 1, 1, 1]),
        ([0.25, 0.75], [1, 1, 0, 0]),
        ([0.3, 0.999], [0, 1, 1, 0]),
        ([0.5, 1.0], [0, 1, 1, 1]),
        ([0.2, 0.4], [1, 0, 0, 0, 0]),  # 1 - 800 / 1000 in float32 is less than 0.2
        ([0.4, 0.6], [0, 1, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("channels", ["all", "three"])
def test_the_interval_and_the_channels_of_ddim(interval, within, channels):
    steps, stride = len(within), 1000 // len(within)
    found = moved("ddpm", solver="ddim", steps=steps, guidance_interval=interval, guided_channels=channels)
    for request, shift in found.items():
        for first, last, factor in ((0, 12, 1), (12, 16, 2)):
            x = 0.0
            for level, one in zip(range(1000 - stride, -1, -stride), within, strict=True):
                now, before = ALPHA_BAR[level], ALPHA_BAR[level - stride] if level else 1.0
                spared = channels == "three" and first == 12
                e = factor * (guided(request.label) if one and not spared else request.label)
                x = np.sqrt(before) * (x - np.sqrt(1 - now) * e) / np.sqrt(now) + np.sqrt(1 - before) * e
            np.testing.assert_allclose(shift[..., first:last], x, rtol=1e-4)


def keyed_normals(draw_number: int, request: ImageRequest) -> np.ndarray:
    """The noise of a step of one image, from the generator in NumPy: (rows, columns, 16)."""
    index = np.arange(request.tokens * 16)
    u = (rng.words(7, Purpose.SAMPLER_NOISE, draw_number, request.index, index) + 0.5) * 2.0**-32
    radius, angle = np.sqrt(-2 * np.log(u[0::2])), 2 * np.pi * u[1::2]
    both = np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1)
    return both.reshape(request.rows, request.columns, 16)


@pytest.mark.parametrize("v", [None, 0.4])
def test_ancestral_noise_is_keyed_and_the_variance_is_of_the_conditional_pass(v):
    """Levels 0, 500 and 999, no predicted noise: draw 0 is the start, draw k + 1 that of step k, and the last has
    none."""
    found = draw(Numbers(0.0, v), "ddpm", solver="ddpm", steps=3)
    for request in REQUESTS:
        x = keyed_normals(0, request)
        for k, (level, before) in enumerate([(999, 500), (500, 0), (0, None)]):
            a = ALPHA_BAR[before] if before is not None else 1.0
            beta = 1 - ALPHA_BAR[level] / a
            x = x / np.sqrt(1 - beta)
            if before is not None:
                posterior = beta * (1 - a) / (1 - ALPHA_BAR[level])
                share = 0.0 if v is None else (v + 1) / 2
                x = x + beta ** (share / 2) * posterior ** ((1 - share) / 2) * keyed_normals(k + 1, request)
        np.testing.assert_allclose(found[request], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "heun", "sde", "dopri5"])
def test_a_flow_ignores_a_second_output(solver):
    one, two = (draw(Numbers(1.0, v), solver=solver, steps=2, guided_channels="three") for v in (None, 0.4))
    for request in REQUESTS:
        np.testing.assert_array_equal(one[request], two[request])


@pytest.mark.parametrize(
    "objective, solver, sentence",
    [
        ("ddpm", "euler", "is euler, which is for objective=flow, and this network's is ddpm: use ddpm or ddim"),
        ("ddpm", "dopri5", "is dopri5, which is for objective=flow, and this network's is ddpm: use ddpm or ddim"),
        ("flow", "ddim", "is ddim, which is for objective=ddpm, .* is flow: use euler, heun, dopri5 or sde"),
    ],
)
def test_a_solver_for_another_objective_is_refused(objective, solver, sentence):
    with pytest.raises(UserError, match=f"^sampling.solver {sentence}$"):
        draw(Numbers(), objective, solver=solver)
