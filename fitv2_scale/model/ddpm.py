"""DDPM as DiT and FiT train it: level t of 1000 is x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise (see
``ddpm_schedule``), x0 is the image, and the network, given t, predicts the noise.

If it has a second half of output, v, that says how wide the step to the level before is: the logarithm of its variance
lies (v + 1) / 2 of the way from that of the posterior, given x0, to that of beta. It is learned from the variational
bound of that step, in bits: KL(posterior || step), and at level 0 the likelihood of x0, of which the bound is the mean
over 1000 steps. The noise learns nothing from the bound, and the bound is not scaled (Nichol and Dhariwal,
arXiv 2102.09672, as DiT has it).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from data_sharding.rng import Purpose
from fitv2_scale.config.model import DdpmConfig
from fitv2_scale.model.ddpm_schedule import LEVELS, DdpmSchedule
from fitv2_scale.model.noise import first_uniform, labels_or_none, noise_of
from fitv2_scale.model.objective import VALIDATION_SEED, ImageLosses, NoisedBatch, image_means
from fitv2_scale.model.packed_batch import PackedBatch

_HALF_BIN = 1 / 255  # the likelihood of x0 is that of a bin about it, as of a pixel in -1 .. 1; so the ends are open
_END = 0.999
_LEAST_LIKELIHOOD = 1e-12


class Ddpm:
    """The objective ``ddpm``."""

    def __init__(self, config: DdpmConfig, classes: int, seed: int, device: torch.device):
        self._config, self._classes, self._seed = config, classes, seed
        schedule = DdpmSchedule.of_training()
        alpha_bar_K, sigma_K = schedule.alpha_bar_K, (schedule.posterior_log_variance_K / 2).exp()
        # x0 = x_t / sqrt(alpha_bar) - sqrt(1 / alpha_bar - 1) noise, so the means of step and posterior differ by the
        # error in the noise times this; and by so many of the posterior's standard deviations:
        shift_K = schedule.posterior_x0_K * (1 / alpha_bar_K - 1).sqrt() / sigma_K
        log_ratio_K = schedule.beta_K.log() - schedule.posterior_log_variance_K
        self._mix_2K = torch.stack((alpha_bar_K.sqrt(), (1 - alpha_bar_K).sqrt())).float().to(device)
        self._bound_2K = torch.stack((shift_K, log_ratio_K)).float().to(device)
        self._half_bin = _HALF_BIN / sigma_K[0].item()

    def training_batch(self, batch: PackedBatch) -> NoisedBatch:
        u_I = first_uniform(Purpose.TIMESTEP, self._seed, batch.epoch_I, batch.sample_id_I)
        label_I = labels_or_none(batch, self._config.label_dropout, self._classes, self._seed)
        return self._noised(batch, (u_I * LEVELS).long(), label_I, noise_of(batch, Purpose.NOISE, self._seed))

    def validation_batch(self, batch: PackedBatch, u_I: Tensor) -> NoisedBatch:
        """At the levels floor(1000 (1 - u)): as in a flow, u near 0 is noise."""
        level_I = (LEVELS - LEVELS * u_I).long()  # in this form exact where 1000 u is whole
        return self._noised(batch, level_I, batch.label_I, noise_of(batch, Purpose.VALIDATION_NOISE, VALIDATION_SEED))

    def _noised(self, batch: PackedBatch, level_I: Tensor, label_I: Tensor, noise_TC: Tensor) -> NoisedBatch:
        of_x0_T1, of_noise_T1 = self._mix_2K[:, level_I[batch.packing.image_T], None]
        return NoisedBatch(
            x_TC=of_x0_T1 * batch.latents_TC + of_noise_T1 * noise_TC,
            target_TC=noise_TC,
            t_I=level_I.float(),
            label_I=label_I,
        )

    def losses(self, network: Callable[..., Tensor], noised: NoisedBatch, batch: PackedBatch) -> ImageLosses:
        output_TC = network(noised.x_TC, noised.t_I, noised.label_I, batch.packing).float()
        predicted_TC, *v_TC = output_TC.split(noised.target_TC.shape[1], -1)
        error_TC = predicted_TC - noised.target_TC
        loss_TC = error_TC.square()
        if v_TC:
            level_T1 = noised.t_I.long()[batch.packing.image_T, None]
            loss_TC = loss_TC + self._bits(error_TC.detach(), v_TC[0], batch.latents_TC, level_T1)
        return ImageLosses(image_means(loss_TC, batch), 1 - noised.t_I / LEVELS)

    def _bits(self, error_TC: Tensor, v_TC: Tensor, x0_TC: Tensor, level_T1: Tensor) -> Tensor:
        """The bound of the step from each level, in bits: float32 (T, C). The unit of all lengths here is the standard
        deviation of the posterior, so that nothing large cancels."""
        shift_T1, log_ratio_T1 = self._bound_2K[:, level_T1]
        log_variance_TC = (v_TC + 1) / 2 * log_ratio_T1
        centred_TC = shift_T1 * error_TC * (-log_variance_TC / 2).exp()
        kl_TC = (torch.expm1(-log_variance_TC) + log_variance_TC + centred_TC.square()) / 2
        half_bin_TC = self._half_bin * (-log_variance_TC / 2).exp()
        nats_TC = torch.where(level_T1 == 0, _surprise(centred_TC, half_bin_TC, x0_TC), kl_TC)
        return nats_TC / math.log(2)


def _surprise(centred_TC: Tensor, half_bin_TC: Tensor, x0_TC: Tensor) -> Tensor:
    """-log of the likelihood of x0's bin, ``centred_TC`` standard deviations above the mean. Of two equal tails the
    lower is taken: the upper would be 1 minus a number near 1."""
    below_TC = -centred_TC.abs()
    inside_TC = _cdf(below_TC + half_bin_TC) - _cdf(below_TC - half_bin_TC)
    lowest_TC, highest_TC = _cdf(centred_TC + half_bin_TC), _cdf(half_bin_TC - centred_TC)
    likelihood_TC = torch.where(x0_TC < -_END, lowest_TC, torch.where(x0_TC > _END, highest_TC, inside_TC))
    return -likelihood_TC.clamp(min=_LEAST_LIKELIHOOD).log()


def _cdf(x: Tensor) -> Tensor:
    """Of a standard normal, as GELU's tanh has it: (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
