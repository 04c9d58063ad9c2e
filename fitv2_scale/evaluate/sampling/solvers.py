"""Solvers from noise (t = 0) to data (t = 1) along a velocity field: fixed steps, adaptive steps, and an SDE.

State is packed, x (N, C): the tokens of I images, one after another. Each solver stores only the last state, and
returns the number of evaluations of the velocity for each image (NFE; with guidance an evaluation is two passes through
the network).

dopri5 is torchode's, although that requires torchtyping, which is no longer developed, and so typeguard < 3: among the
maintained libraries only torchode gives each image of a batch its own error norm and steps. torchdiffeq takes one step
for the whole batch, and scipy's RK45 solves for one state, so either would call the network for each image separately:
846 times for 18 samples of the demo, by scipy, where torchode calls it 68 times for one pack. (Images that are done are
evaluated with the rest: on a CPU, where the cost of a call is its computation, the pack took 25 s and scipy 17 s.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]  # (x (N, C), time of each image (I,)) -> (N, C), here the velocity

LAST_STEP = 0.04  # of the SDE, as in SiT and FiTv2


@dataclass(frozen=True)
class Images:
    """The positions of the images among the N tokens."""

    image_N: Tensor  # int64, ascending
    place_N: Tensor  # int64, index of the token in its image
    length_I: Tensor  # int64, tokens

    def times(self, t: float) -> Tensor:
        return torch.full((len(self.length_I),), t, dtype=torch.float32, device=self.length_I.device)

    def count(self, evaluations: int) -> Tensor:
        return torch.full_like(self.length_I, evaluations)


def euler(velocity: Field, x_NC: Tensor, images: Images, steps: int) -> tuple[Tensor, Tensor]:
    """Euler's first-order method. Returns x at t = 1 and the NFE of each image, int64 (I,)."""
    for k in range(steps):
        x_NC = x_NC + velocity(x_NC, images.times(k / steps)) / steps
    return x_NC, images.count(steps)


def heun(velocity: Field, x_NC: Tensor, images: Images, steps: int) -> tuple[Tensor, Tensor]:
    """Heun's second-order method: the mean of the velocities at both ends of an Euler step. Returns as ``euler``."""
    for k in range(steps):
        first_NC = velocity(x_NC, images.times(k / steps))
        second_NC = velocity(x_NC + first_NC / steps, images.times((k + 1) / steps))
        x_NC = x_NC + (first_NC + second_NC) / (2 * steps)
    return x_NC, images.count(2 * steps)


def sde(
    velocity: Field, x_NC: Tensor, images: Images, steps: int, noise: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    """The Euler-Maruyama method on dx = (v + w s) dt + sqrt(2 w) dW with w = sigma_t = 1 - t, as in SiT
    (arXiv 2401.08740; "Euler", diffusion form "sigma", last step "Mean").

    On the linear path the score is s = (t v - x) / (1 - t), so w s = t v - x without a division by zero. The first
    ``steps`` - 1 steps are equal and end at 1 - LAST_STEP; the last one follows the mean. ``noise(k)`` is the standard
    normal of step k, (N, C). Returns as ``euler``.
    """

    def drift(t: float) -> Tensor:
        return (1 + t) * velocity(x_NC, images.times(t)) - x_NC

    dt = (1 - LAST_STEP) / max(steps - 1, 1)
    for k in range(steps - 1):
        t = k * dt
        x_NC = x_NC + drift(t) * dt + (2 * (1 - t) * dt) ** 0.5 * noise(k)
    start = 1 - LAST_STEP if steps > 1 else 0.0
    return x_NC + drift(start) * (1 - start), images.count(steps)


def dopri5(velocity: Field, x_NC: Tensor, images: Images, atol: float, rtol: float) -> tuple[Tensor, Tensor]:
    """The Dormand-Prince method of order 5, by torchode: each image has its own error norm (the RMS over its tokens)
    and its own steps, so it does not depend on the other images of the pack. Returns as ``euler``."""
    import torchode

    count, longest = len(images.length_I), int(images.length_I.max())
    at_N = images.image_N * longest + images.place_N  # indices of the tokens when images are padded to the longest
    channels = x_NC.shape[1]

    def pad(packed_NC: Tensor) -> Tensor:
        return packed_NC.new_zeros(count * longest, channels).index_copy_(0, at_N, packed_NC).view(count, -1)

    def packed(padded: Tensor) -> Tensor:
        return padded.view(-1, channels).index_select(0, at_N)

    def rms(padded: Tensor) -> Tensor:
        return (padded.square().sum(1) / (images.length_I * channels)).sqrt()

    def derivative(t_I: Tensor, padded: Tensor) -> Tensor:
        return pad(velocity(packed(padded), t_I.float()))

    # torchode's annotations, with torchtyping, admit no plain tensor.
    term = torchode.ODETerm(derivative)  # pyrefly: ignore[bad-argument-type]
    controller = torchode.IntegralController(atol, rtol, term=term, norm=rms)  # pyrefly: ignore[bad-argument-type]
    method = torchode.Dopri5(term=term)
    solver = torchode.AutoDiffAdjoint(method, controller).to(x_NC.device)  # pyrefly: ignore[bad-argument-type]
    start = torch.zeros(count, dtype=torch.float64, device=x_NC.device)
    end = torch.ones_like(start)
    problem = torchode.InitialValueProblem(pad(x_NC), start, end)  # pyrefly: ignore[bad-argument-type]
    solution = solver.solve(problem)
    failed = solution.status != torchode.Status.SUCCESS.value
    if failed.any():
        raise ArithmeticError(f"dopri5 found no step small enough for {int(failed.sum())} images: is a velocity NaN?")
    # Two evaluations to find the first step, then six per step, since the last of one step is the first of the next.
    return packed(solution.ys[:, -1]), 2 + 6 * solution.stats["n_steps"]
