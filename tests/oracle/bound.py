"""What DDPM's variance is learned from, in float64, straight from the formulas of arXiv 2006.11239 and 2102.09672."""

import math

import torch
from torch import Tensor

_BETAS = [1e-4 + k * (0.02 - 1e-4) / 999 for k in range(1000)]


def kept(level: int) -> float:
    """alpha_bar: how much of an image's variance is left at a level; 1 before the first."""
    return math.prod(1 - beta for beta in _BETAS[: level + 1])


def _posterior_variance(level: int) -> float:
    """Of the level before, given the image; that of the first, which is 0, stands for the second's."""
    level = max(level, 1)
    return _BETAS[level] * (1 - kept(level - 1)) / (1 - kept(level))


def _mean_before(image: Tensor, x: Tensor, level: int) -> Tensor:
    of_image = _BETAS[level] * math.sqrt(kept(level - 1)) / (1 - kept(level))
    of_x = (1 - kept(level - 1)) * math.sqrt(1 - _BETAS[level]) / (1 - kept(level))
    return of_image * image + of_x * x


def _below(x: Tensor) -> Tensor:
    """The distribution of a standard normal, as GELU's tanh approximates it."""
    return (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()) / 2


def bits(predicted: Tensor, v: Tensor, image: Tensor, x: Tensor, level: int) -> Tensor:
    """Of each number, in bits. ``predicted`` is the noise, of which nothing is learned here."""
    guess = (x - math.sqrt(1 - kept(level)) * predicted.detach()) / math.sqrt(kept(level))
    mean, part = _mean_before(guess, x, level), (v + 1) / 2
    log_variance = part * math.log(_BETAS[level]) + (1 - part) * math.log(_posterior_variance(level))
    if level > 0:
        true_mean, true_variance = _mean_before(image, x, level), _posterior_variance(level)
        ratio = (true_variance + (true_mean - mean) ** 2) / log_variance.exp()
        return (log_variance - math.log(true_variance) + ratio - 1) / 2 / math.log(2)
    deviation = (log_variance / 2).exp()
    upper, lower = _below((image - mean + 1 / 255) / deviation), _below((image - mean - 1 / 255) / deviation)
    likelihood = torch.where(image < -0.999, upper, torch.where(image > 0.999, 1 - lower, upper - lower))
    return -likelihood.clamp(min=1e-12).log() / math.log(2)
