"""From noise (t = 0) to data (t = 1) along a velocity field: fixed steps, adaptive steps, and a stochastic path.

State is packed, x (N, C), the tokens of I images end to end. Each solver keeps nothing but the last state, and says how
often it asked for the velocity at each image (NFE; with guidance an evaluation is two passes through the network).

dopri5 is torchode's, although that brings torchtyping, which is no longer developed, and with it typeguard < 3: of the
libraries that are looked after, it alone gives each image of a batch its own error norm and steps. torchdiffeq takes
one step for the whole batch, and scipy's RK45 solves for one state, so that either would call the network for each
image alone: 846 times for 18 samples of the demo, by scipy, where torchode calls it 68 times for one pack. (An image
that is done is evaluated along with the rest: on a CPU, where a call costs what it computes, the pack took 25 s and
scipy 17.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x (N, C), t (I,)) -> (N, C)

LAST_STEP = 0.04  # of the SDE, as in SiT and FiTv2


@dataclass(frozen=True)
class Images:
    """Where the images lie among the N tokens."""

    image_N: Tensor  # int64, ascending
    place_N: Tensor  # int64, index of the token in its image
    length_I: Tensor  # int64, tokens

    def times(self, t: float) -> Tensor:
        return torch.full((len(self.length_I),), t, device=self.length_I.device)

    def count(self, evaluations: int) -> Tensor:
        return torch.full_like(self.length_I, evaluations)


def euler(velocity: Velocity, x_NC: Tensor, images: Images, steps: int) -> tuple[Tensor, Tensor]:
    """The first-order method. Returns x at t = 1 and the NFE of each image, int64 (I,)."""
    for k in range(steps):
        x_NC = x_NC + velocity(x_NC, images.times(k / steps)) / steps
    return x_NC, images.count(steps)


def heun(velocity: Velocity, x_NC: Tensor, images: Images, steps: int) -> tuple[Tensor, Tensor]:
    """The second-order method: the mean of the velocities at both ends of an Euler step. Returns as ``euler``."""
    for k in range(steps):
        first_NC = velocity(x_NC, images.times(k / steps))
        second_NC = velocity(x_NC + first_NC / steps, images.times((k + 1) / steps))
        x_NC = x_NC + (first_NC + second_NC) / (2 * steps)
    return x_NC, images.count(2 * steps)


def sde(
    velocity: Velocity, x_NC: Tensor, images: Images, steps: int, noise: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Euler and Maruyama's method on dx = (v + w s) dt + sqrt(2 w) dW with w = sigma_t = 1 - t, as SiT samples
    (arXiv 2401.08740; "Euler", diffusion form "sigma", last step "Mean").

    On the linear path the score is s = (t v - x) / (1 - t), so that w s = t v - x and nothing is divided by zero. The
    first ``steps`` - 1 steps are even and end at 1 - LAST_STEP; the last one follows the mean. ``noise(k)`` is the
    standard normal of step k, (N, C). Returns as ``euler``.
    """

    def drift(t: float) -> Tensor:
        return (1 + t) * velocity(x_NC, images.times(t)) - x_NC

    dt = (1 - LAST_STEP) / max(steps - 1, 1)
    for k in range(steps - 1):
        t = k * dt
        x_NC = x_NC + drift(t) * dt + (2 * (1 - t) * dt) ** 0.5 * noise(k)
    start = 1 - LAST_STEP if steps > 1 else 0.0
    return x_NC + drift(start) * (1 - start), images.count(steps)


def dopri5(velocity: Velocity, x_NC: Tensor, images: Images, atol: float, rtol: float) -> tuple[Tensor, Tensor]:
    """Dormand and Prince's method of order 5, by torchode: each image has its own error norm (the RMS over its own
    tokens) and its own steps, so what it becomes does not depend on the images beside it. Returns as ``euler``."""
    import torchode

    count, longest = len(images.length_I), int(images.length_I.max())
    at_N = images.image_N * longest + images.place_N  # where the tokens lie when images are padded to the longest
    channels = x_NC.shape[1]

    def pad(packed_NC: Tensor) -> Tensor:
        return packed_NC.new_zeros(count * longest, channels).index_copy_(0, at_N, packed_NC).view(count, -1)

    def packed(padded: Tensor) -> Tensor:
        return padded.view(-1, channels).index_select(0, at_N)

    def rms(padded: Tensor) -> Tensor:
        return (padded.square().sum(1) / (images.length_I * channels)).sqrt()

    term = torchode.ODETerm(lambda t_I, padded: pad(velocity(packed(padded), t_I.float())))
    controller = torchode.IntegralController(atol, rtol, term=term, norm=rms)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), controller).to(x_NC.device)
    start = torch.zeros(count, dtype=torch.float64, device=x_NC.device)
    solution = solver.solve(torchode.InitialValueProblem(pad(x_NC), start, torch.ones_like(start)))
    failed = solution.status != torchode.Status.SUCCESS.value
    if failed.any():
        raise ArithmeticError(f"dopri5 found no step small enough for {int(failed.sum())} images: is a velocity NaN?")
    # Two evaluations to find the first step, then six a step, for the last of one step is the first of the next.
    return packed(solution.ys[:, -1]), 2 + 6 * solution.stats["n_steps"]
