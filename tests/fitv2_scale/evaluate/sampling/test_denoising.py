"""Solvers of a DDPM on data whose noise is known exactly, in closed form and in float64."""

from math import exp, log, sqrt

import numpy as np
import pytest
import torch
from torch import Tensor

from fitv2_scale.evaluate.sampling.denoising import ancestral, ddim
from fitv2_scale.evaluate.sampling.solvers import Images

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
LENGTHS, CHANNELS = torch.tensor([3, 1]), 16


def images() -> Images:
    return Images(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 0]), LENGTHS)


def normals(seed: int) -> Tensor:
    return torch.randn(4, CHANNELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Point:
    """The noise in x if all data are the point ``at``, and what the solver asked for: levels and states.

    With ``v``, the output has it as its second half.
    """

    at = 0.7

    def __init__(self, v: Tensor | None = None):
        self.v, self.levels, self.states = v, [], []

    def __call__(self, x_NC: Tensor, t_I: Tensor) -> Tensor:
        assert t_I.dtype == torch.float32 and t_I.tolist() == [t_I[0].item()] * 2
        alpha_bar = ALPHA_BAR[int(t_I[0])]
        self.levels.append(t_I[0].item())
        self.states.append(x_NC)
        e_NC = (x_NC - sqrt(alpha_bar) * self.at) / sqrt(1 - alpha_bar)
        return e_NC if self.v is None else torch.cat((e_NC, self.v.expand_as(e_NC)), 1)


def close(found: Tensor, expected: Tensor | float) -> None:
    expected = expected if isinstance(expected, Tensor) else torch.full_like(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_levels_of_250_and_of_ddim():
    field = Point()
    _, nfe_I = ancestral(field, normals(0), images(), 250, normals)
    assert field.levels[:4] == [999, 995, 991, 987] and field.levels[-4:] == [12, 8, 4, 0]
    assert len(field.levels) == 250 and nfe_I.tolist() == [250, 250]
    assert {500, 502} & set(field.levels) == {502}  # 125 * 999 / 249 = 501.506
    field = Point()
    _, nfe_I = ddim(field, normals(0), images(), 50)
    assert field.levels == list(range(980, -1, -20)) and nfe_I.tolist() == [50, 50]


@pytest.mark.parametrize("steps", [2, 50, 250, 1000])
def test_a_point_is_hit_exactly(steps):
    assert_is_the_point(ancestral(Point(), normals(0), images(), steps, normals))
    assert_is_the_point(ddim(Point(), normals(0), images(), steps))


def assert_is_the_point(found: tuple[Tensor, Tensor]) -> None:
    close(found[0], Point.at)


def test_ancestral_sampling_goes_through_the_marginals():
    """With the posterior's variance. Let s be alpha_bar / (1 - alpha_bar), and y the deviation of x from its mean, as a
    multiple of sqrt(1 - alpha_bar). The bridge to a point is a random walk: y sqrt(s) changes by a normal of variance
    s_after - s_before in each step. So y stays of variance 1."""
    field = Point()
    ancestral(field, normals(99), images(), 250, normals)
    signal = [ALPHA_BAR[int(t)] / (1 - ALPHA_BAR[int(t)]) for t in field.levels]
    walk = normals(99) - sqrt(ALPHA_BAR[999]) * Point.at
    walk = walk / sqrt(1 - ALPHA_BAR[999]) * sqrt(signal[0])
    for k, (level, state) in enumerate(zip(field.levels, field.states, strict=True)):
        if k > 0:
            walk = walk + sqrt(signal[k] - signal[k - 1]) * normals(k - 1)
        alpha_bar = ALPHA_BAR[int(level)]
        close(state, sqrt(alpha_bar) * Point.at + walk / sqrt(signal[k]) * sqrt(1 - alpha_bar))


@pytest.mark.parametrize("v", [-1.0, 0.3, 1.0])
def test_the_learned_variance_lies_between_the_two_that_are_known(v):
    """In the logarithm, each channel by its own v; the mean does not change. Levels 0, 500 and 999."""
    v_C = torch.linspace(v, v / 2, CHANNELS, dtype=torch.float64)
    field, alone = Point(v_C), Point()
    close(ancestral(field, normals(5), images(), 3, normals)[0], Point.at)  # no noise in the last step
    ancestral(alone, normals(5), images(), 3, normals)
    for k, (level, before) in enumerate([(999, 500), (500, 0)]):
        beta = 1 - ALPHA_BAR[level] / ALPHA_BAR[before]
        posterior = beta * (1 - ALPHA_BAR[before]) / (1 - ALPHA_BAR[level])
        # The mean by the form that has no x0: (x - beta / sqrt(1 - alpha_bar) e) / sqrt(1 - beta).
        e_NC = (field.states[k] - sqrt(ALPHA_BAR[level]) * Point.at) / sqrt(1 - ALPHA_BAR[level])
        mean_NC = (field.states[k] - beta / sqrt(1 - ALPHA_BAR[level]) * e_NC) / sqrt(1 - beta)
        share_C = (v_C + 1) / 2
        deviation_C = (share_C * log(beta) + (1 - share_C) * log(posterior)).div(2).exp()
        close(field.states[k + 1], mean_NC + deviation_C * normals(k))
        if k == 0:
            close(alone.states[1], mean_NC + exp(log(posterior) / 2) * normals(0))


def test_ddim_follows_its_recursion_on_a_gaussian():
    """Data N(0, 0.5^2): then the noise expected in x is a multiple of x, and so is each state."""
    variance, x, states = 0.25, 1.0, []

    def field(x_NC: Tensor, t_I: Tensor) -> Tensor:
        states.append(x_NC)
        alpha_bar = ALPHA_BAR[int(t_I[0])]
        e_NC = sqrt(1 - alpha_bar) / (alpha_bar * variance + 1 - alpha_bar) * x_NC
        return torch.cat((e_NC, torch.full_like(e_NC, 7.0)), 1)  # v is of no use here

    found, _ = ddim(field, normals(0), images(), 20)
    for k, level in enumerate(range(950, -1, -50)):
        close(states[k], x * normals(0))
        alpha_bar, before = ALPHA_BAR[level], ALPHA_BAR[level - 50] if level else 1.0
        e = sqrt(1 - alpha_bar) / (alpha_bar * variance + 1 - alpha_bar) * x
        x = sqrt(before) * (x - sqrt(1 - alpha_bar) * e) / sqrt(alpha_bar) + sqrt(1 - before) * e
    close(found, x * normals(0))


def test_ddim_converges_to_the_map_of_quantiles():
    """Without noise, a standard normal becomes the data's Gaussian, each quantile where it was: at order one."""
    variance, errors = 0.25, []

    def field(x_NC: Tensor, t_I: Tensor) -> Tensor:
        alpha_bar = ALPHA_BAR[int(t_I[0])]
        return sqrt(1 - alpha_bar) / (alpha_bar * variance + 1 - alpha_bar) * x_NC

    for steps in (125, 250, 500):
        at = ALPHA_BAR[1000 - 1000 // steps]
        exact = sqrt(variance / (at * variance + 1 - at)) * normals(0)
        errors.append((ddim(field, normals(0), images(), steps)[0] - exact).abs().max().item())
    assert errors[2] < 0.02
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert log(coarse / fine, 2) == pytest.approx(1, abs=0.2)


def test_the_state_stays_float32():
    for found, _ in (
        ancestral(Point(torch.zeros(CHANNELS)), normals(0).float(), images(), 250, lambda k: normals(k).float()),
        ddim(Point(), normals(0).float(), images(), 250),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.full_like(found, Point.at), rtol=1e-4, atol=1e-4)
