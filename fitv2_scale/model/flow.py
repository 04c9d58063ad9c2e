"""Rectified flow: t = 0 is noise, t = 1 is data, x_t = t x1 + (1 - t) x0, and the network learns v = x1 - x0."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data_sharding.rng import Purpose
from fitv2_scale.config.model import FlowConfig
from fitv2_scale.model.noise import first_uniform, first_words, labels_or_none, noise_of
from fitv2_scale.model.objective import VALIDATION_SEED, ImageLosses, NoisedBatch, image_means
from fitv2_scale.model.packed_batch import PackedBatch
from fitv2_scale.model.rng import normal


def sample_t(sampler: str, seed: int, epoch_I: Tensor, id_I: Tensor) -> Tensor:
    """The training time of each image in (0, 1): float32 (I,)."""
    if sampler == "uniform":
        return first_uniform(Purpose.TIMESTEP, seed, epoch_I, id_I).float()
    return torch.sigmoid(normal(first_words(Purpose.TIMESTEP, seed, epoch_I, id_I))[:, 0]).float()


@dataclass(frozen=True)
class Flow:
    """The objective ``flow``. A network that also has a second half of output is trained on the first, as SiT is."""

    config: FlowConfig
    classes: int
    seed: int

    def training_batch(self, batch: PackedBatch) -> NoisedBatch:
        t_I = sample_t(self.config.t_sampler, self.seed, batch.epoch_I, batch.sample_id_I)
        label_I = labels_or_none(batch, self.config.label_dropout, self.classes, self.seed)
        return _noised(batch, t_I, label_I, noise_of(batch, Purpose.NOISE, self.seed))

    def validation_batch(self, batch: PackedBatch, u_I: Tensor) -> NoisedBatch:
        """At the times ``u_I``."""
        return _noised(batch, u_I.float(), batch.label_I, noise_of(batch, Purpose.VALIDATION_NOISE, VALIDATION_SEED))

    def losses(self, network: Callable[..., Tensor], noised: NoisedBatch, batch: PackedBatch) -> ImageLosses:
        output_TC, target_TC = network(noised.x_TC, noised.t_I, noised.label_I, batch.packing), noised.target_TC
        if output_TC.shape[1] > target_TC.shape[1]:
            output_TC = output_TC[:, : target_TC.shape[1]]
        return ImageLosses(image_means((output_TC.float() - target_TC).square(), batch), noised.t_I)


def _noised(batch: PackedBatch, t_I: Tensor, label_I: Tensor, x0_TC: Tensor) -> NoisedBatch:
    t_T1 = t_I[batch.packing.image_T][:, None]
    return NoisedBatch(
        x_TC=t_T1 * batch.latents_TC + (1 - t_T1) * x0_TC,
        target_TC=batch.latents_TC - x0_TC,
        t_I=t_I,
        label_I=label_I,
    )
