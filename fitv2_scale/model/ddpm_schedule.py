"""The noise levels of a DDPM as DiT and FiT train it, and fewer of them for sampling.

Level t of 1000 mixes an image x0 with noise: x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise, where alpha_bar is
the product of 1 - beta over the levels up to t, and beta rises linearly. Level 0 is almost the image, level 999 almost
noise. A sampler may leave levels out; the others then have other betas, with the same alpha_bar.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_sharding.errors import UserError
from fitv2_scale.config.solvers import DDPM_LEVELS as LEVELS

_FIRST_BETA, _LAST_BETA = 1e-4, 0.02


@dataclass(frozen=True)
class DdpmSchedule:
    """K levels from the least noise to the most, as float64 tables (K,) on the CPU.

    The posterior is the distribution of x one level before, given x_t and x0: a Gaussian of mean
    ``posterior_x0_K x0 + posterior_xt_K x_t`` and variance ``posterior_variance_K``. Its variance at the first level is
    0; so the logarithm there is that of the second level.
    """

    t_K: Tensor  # int64, the level of the 1000 that the network is given
    beta_K: Tensor
    alpha_bar_K: Tensor
    alpha_bar_before_K: Tensor  # of the level before; 1 at the first
    posterior_variance_K: Tensor
    posterior_log_variance_K: Tensor
    posterior_x0_K: Tensor
    posterior_xt_K: Tensor

    @classmethod
    def of_training(cls) -> "DdpmSchedule":
        """All levels."""
        beta_K = torch.linspace(_FIRST_BETA, _LAST_BETA, LEVELS, dtype=torch.float64)
        return cls._of(torch.arange(LEVELS), beta_K, (1 - beta_K).cumprod(0))

    @classmethod
    def respaced(cls, steps: str) -> "DdpmSchedule":
        """The levels of ``steps``: "250", evenly spaced from the first to the last; "ddim50", each 20th from the first.

        Raises UserError if there are no such levels.
        """
        t_K = torch.tensor(_spaced(steps))
        alpha_bar_K = cls.of_training().alpha_bar_K[t_K]
        return cls._of(t_K, 1 - alpha_bar_K / _before(alpha_bar_K), alpha_bar_K)

    @classmethod
    def _of(cls, t_K: Tensor, beta_K: Tensor, alpha_bar_K: Tensor) -> "DdpmSchedule":
        before_K = _before(alpha_bar_K)
        variance_K = beta_K * (1 - before_K) / (1 - alpha_bar_K)
        return cls(
            t_K=t_K,
            beta_K=beta_K,
            alpha_bar_K=alpha_bar_K,
            alpha_bar_before_K=before_K,
            posterior_variance_K=variance_K,
            posterior_log_variance_K=torch.cat((variance_K[1:2], variance_K[1:])).log(),
            posterior_x0_K=beta_K * before_K.sqrt() / (1 - alpha_bar_K),
            posterior_xt_K=(1 - before_K) * (1 - beta_K).sqrt() / (1 - alpha_bar_K),
        )


def _before(alpha_bar_K: Tensor) -> Tensor:
    return torch.cat((alpha_bar_K.new_ones(1), alpha_bar_K[:-1]))


def _spaced(steps: str) -> list[int]:
    number = steps.removeprefix("ddim")
    count = int(number) if number.isdecimal() else 0
    if not 2 <= count <= LEVELS:
        raise UserError(f"steps '{steps}': give 2 to {LEVELS}, as in 250, or ddim50 for strides of equal length")
    if number == steps:
        return [round(i * (LEVELS - 1) / (count - 1)) for i in range(count)]
    for stride in range(1, LEVELS):
        if len(found := range(0, LEVELS, stride)) == count:
            return list(found)
    raise UserError(f"steps '{steps}': no stride through {LEVELS} levels has {count} steps; give a divisor of {LEVELS}")
