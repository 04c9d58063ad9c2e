"""Solvers on velocities in closed form: their order, their agreement, and what they count."""

import math

import numpy as np
import pytest
import torch
import torchode
from scipy.integrate import solve_ivp
from torch import Tensor

from fitv2_scale.evaluate.sampling.solvers import LAST_STEP, Images, dopri5, euler, heun, sde

LENGTHS = torch.tensor([3, 7, 1])


def images() -> Images:
    image_N = torch.repeat_interleave(torch.arange(3), LENGTHS)
    return Images(image_N, torch.cat([torch.arange(n) for n in LENGTHS]), LENGTHS)


def start() -> Tensor:
    return torch.randn(11, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Swing:
    """dx/dt = rate x cos(3 t), a rate an image: x(1) = x(0) exp(rate sin(3) / 3). Counts its calls."""

    def __init__(self, rates=(0.5, -2.0, 4.0)):
        self.calls, self.rate_I, self.image_N = 0, torch.tensor(rates, dtype=torch.float64), images().image_N

    def __call__(self, x_NC: Tensor, t_I: Tensor) -> Tensor:
        self.calls += 1
        return x_NC * (self.rate_I * torch.cos(3 * t_I.double()))[self.image_N][:, None]

    def exact(self) -> Tensor:
        return start() * torch.exp(self.rate_I * math.sin(3) / 3)[self.image_N][:, None]


@pytest.mark.parametrize("solver, order, calls", [(euler, 1, 1), (heun, 2, 2)])
def test_fixed_steps_converge_at_their_order(solver, order, calls):
    errors = []
    for steps in (40, 80, 160):
        velocity = Swing()
        x_NC, nfe_I = solver(velocity, start(), images(), steps)
        assert nfe_I.tolist() == [velocity.calls] * 3 == [calls * steps] * 3
        errors.append((x_NC - velocity.exact()).abs().max().item())
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_dopri5_converges_with_its_tolerance_and_agrees_with_euler():
    for tolerance in (1e-3, 1e-5, 1e-7):
        velocity = Swing()
        x_NC, _ = dopri5(velocity, start(), images(), atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(x_NC, velocity.exact(), rtol=20 * tolerance, atol=20 * tolerance)
    even, _ = euler(Swing(), start(), images(), 20_000)
    torch.testing.assert_close(even, x_NC, rtol=1e-3, atol=1e-3)


def test_dopri5_is_of_order_five():
    """On equal steps, which its library takes if asked to."""
    errors = []
    for steps in (16, 32, 64):
        velocity = Swing()
        term = torchode.ODETerm(lambda t_I, x, v=velocity: v(x.view(11, 16), t_I.expand(3)).view(1, -1))
        solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), torchode.FixedStepController())
        ends = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        problem = torchode.InitialValueProblem(start().view(1, -1), *ends)
        x_NC = solver.solve(problem, dt0=ends[1] / steps).ys[0, -1].view(11, 16)
        errors.append((x_NC - velocity.exact()).abs().max().item())
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(5, abs=0.5)


def test_each_image_has_steps_of_its_own():
    """Steps and result of an image are those that it has alone; the solver of all asks as often as the slowest."""
    velocity = Swing()
    x_NC, nfe_I = dopri5(velocity, start(), images(), 1e-6, 1e-3)
    assert nfe_I[0] < nfe_I[2] and velocity.calls == nfe_I.max()
    for number, rate in enumerate(velocity.rate_I):
        mine = images().image_N == number
        one = Images(
            torch.zeros(int(mine.sum()), dtype=torch.int64), images().place_N[mine], LENGTHS[number : number + 1]
        )
        alone, nfe = dopri5(lambda x, t, r=rate: x * r * torch.cos(3 * t.double()), start()[mine], one, 1e-6, 1e-3)
        torch.testing.assert_close(x_NC[mine], alone, rtol=1e-12, atol=1e-12)
        assert nfe.tolist() == [nfe_I[number].item()]


def test_dopri5_works_about_as_hard_as_scipys():
    for number, rate in enumerate((0.5, -2.0, 4.0)):
        of_image = start()[images().image_N == number].flatten().numpy()
        peer = solve_ivp(lambda t, x, r=rate: r * np.cos(3 * t) * x, (0, 1), of_image, "RK45", rtol=1e-3, atol=1e-6)
        _, nfe_I = dopri5(Swing(), start(), images(), 1e-6, 1e-3)
        assert abs(nfe_I[number].item() - peer.nfev) <= 6


def test_dopri5_says_when_the_velocity_is_not_finite():
    with pytest.raises(ArithmeticError, match="1 images"):
        dopri5(Swing((0.5, math.nan, 1.0)), start(), images(), 1e-6, 1e-3)


class Gaussian:
    """The marginal velocity of the linear path to N(mean, std^2): v = E[x1 - x0 | x_t = x], linear in x."""

    mean, std = 1.5, 0.3

    def __call__(self, x_NC: Tensor, t_I: Tensor) -> Tensor:
        t = t_I[0].double()
        variance = (t * self.std) ** 2 + (1 - t) ** 2
        return self.mean + (t * self.std**2 - (1 - t)) / variance * (x_NC - t * self.mean)

    def score(self, x: Tensor, t: float) -> Tensor:
        return (t * self.mean - x) / ((t * self.std) ** 2 + (1 - t) ** 2)


def brownian(steps: int, finest: int):
    """Standard normals of ``steps`` even steps that are those of ``finest``, added up."""
    fine = torch.randn(finest, 11, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (fine.view(steps, finest // steps, 11, 16).sum(1) / (finest // steps) ** 0.5).__getitem__


def test_the_sde_follows_its_equation():
    """As it stands: dx = (v + w s) dt + sqrt(2 w) dW w = 1 - t, s the score of the marginal; a mean step last."""
    velocity, steps = Gaussian(), 7
    noise, x = brownian(steps - 1, 6), start()
    found, nfe_I = sde(velocity, x, images(), steps, noise)
    dt = (1 - LAST_STEP) / (steps - 1)
    for k in range(steps):
        t, step = (k * dt, dt) if k < steps - 1 else (1 - LAST_STEP, LAST_STEP)
        drift = velocity(x, torch.full((3,), t, dtype=torch.float64)) + (1 - t) * velocity.score(x, t)
        x = x + drift * step + (math.sqrt(2 * (1 - t) * step) * noise(k) if k < steps - 1 else 0)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)  # times are float32
    assert nfe_I.tolist() == [steps] * 3


def test_the_sde_converges_at_order_one_and_to_the_data():
    """Strongly, as its noise does not depend on x: one Brownian path, ever finer steps."""
    finest, at = 1024, {}
    for steps in (32, 64, 128, finest):
        at[steps], _ = sde(Gaussian(), start(), images(), steps + 1, brownian(steps, finest))
    errors = [(at[steps] - at[finest]).square().mean().sqrt().item() for steps in (32, 64, 128)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.35)
    x_NC = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    many = Images(torch.zeros(20_000, dtype=torch.int64), torch.arange(20_000), torch.tensor([20_000]))
    generator = torch.Generator().manual_seed(3)
    x_NC, _ = sde(
        Gaussian(), x_NC, many, 250, lambda k: torch.randn(x_NC.shape, generator=generator, dtype=torch.float64)
    )
    assert x_NC.mean().item() == pytest.approx(Gaussian.mean, abs=0.02)
    assert x_NC.std().item() == pytest.approx(Gaussian.std, abs=0.02)
