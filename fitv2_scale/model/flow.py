"""Rectified flow: t = 0 is noise, t = 1 is data, x_t = t x1 + (1 - t) x0, and the network learns v = x1 - x0.

Each random number is keyed by (seed, purpose, epoch, sample id), so it does not depend on the pack and the rank that an
image is assigned to. The loss is the released one: the mean over an image's valid tokens and channels, then over the
images of the global batch, so that every image has the same weight, however many tokens it has.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data_sharding.rng import Purpose
from fitv2_scale.config.model import FlowConfig
from fitv2_scale.model.packed_batch import PackedBatch
from fitv2_scale.model.rng import normal, uniform, words


@dataclass(frozen=True)
class FlowBatch:
    """The network's input for one pack, and its target."""

    x_TC: Tensor  # float32 (T, C), noised tokens
    target_TC: Tensor  # float32 (T, C), x1 - x0
    t_I: Tensor  # float32 (I,)
    label_I: Tensor  # int64 (I,), dropped labels replaced by ``classes``


def sample_t(sampler: str, seed: int, epoch_I: Tensor, id_I: Tensor) -> Tensor:
    """The training time of each image in (0, 1): float32 (I,)."""
    if sampler == "uniform":
        return _first_uniform(seed, Purpose.TIMESTEP, epoch_I, id_I).float()
    return torch.sigmoid(normal(words(seed, Purpose.TIMESTEP, epoch_I, id_I, torch.zeros_like(id_I)))[:, 0]).float()


def _first_uniform(seed: int, purpose: Purpose, epoch_I: Tensor, id_I: Tensor) -> Tensor:
    return uniform(words(seed, purpose, epoch_I, id_I, torch.zeros_like(id_I))[:, 0])


def noise_words(
    purpose: Purpose, seed: int, epoch_T: Tensor | int, id_T: Tensor, place_T: Tensor, channels: int
) -> Tensor:
    """The integers from which x0 is made: int64 (T, C), value ``C place + channel`` of each image's stream. C is a
    multiple of four, as each patch makes it."""
    blocks = channels // 4  # of four words
    block_TB = place_T[:, None] * blocks + torch.arange(blocks, device=place_T.device)
    epoch_T1 = epoch_T[:, None] if isinstance(epoch_T, Tensor) else epoch_T
    return words(seed, purpose, epoch_T1, id_T[:, None], block_TB).flatten(1)


def make_flow_batch(batch: PackedBatch, config: FlowConfig, classes: int, seed: int) -> FlowBatch:
    t_I = sample_t(config.t_sampler, seed, batch.epoch_I, batch.sample_id_I)
    drop_I = _first_uniform(seed, Purpose.LABEL_DROP, batch.epoch_I, batch.sample_id_I) < config.label_dropout
    return noised(batch, t_I, batch.label_I.masked_fill(drop_I, classes), Purpose.NOISE, seed)


def noised(batch: PackedBatch, t_I: Tensor, label_I: Tensor, purpose: Purpose, seed: int) -> FlowBatch:
    """``batch`` at the times ``t_I``, with the noise of (seed, purpose, epoch, id) of each image."""
    image_T, place_T = batch.packing.image_T, batch.packing.place_T
    epoch_T, id_T, channels = batch.epoch_I[image_T], batch.sample_id_I[image_T], batch.latents_TC.shape[1]
    x0_TC = normal(noise_words(purpose, seed, epoch_T, id_T, place_T, channels)).float()
    t_T1 = t_I[image_T][:, None]
    return FlowBatch(
        x_TC=t_T1 * batch.latents_TC + (1 - t_T1) * x0_TC,
        target_TC=batch.latents_TC - x0_TC,
        t_I=t_I,
        label_I=label_I,
    )


def image_losses(velocity_TC: Tensor, target_TC: Tensor, batch: PackedBatch) -> Tensor:
    """Mean squared error over each image's tokens and channels, float32 (I,); empty slots give 0."""
    error_T = (velocity_TC.float() - target_TC).square().mean(-1)
    lengths_I = batch.packing.cu_seqlens_I1.diff().clamp(min=1)
    return torch.zeros_like(batch.weight_I).index_add(0, batch.packing.image_T, error_T) / lengths_I


@dataclass(frozen=True)
class FlowLosses:
    """The loss of each image of a pack, with its gradient, and the time t of each image; both float32 (I,)."""

    loss_I: Tensor
    t_I: Tensor

    def weighted_sum(self, batch: PackedBatch) -> Tensor:
        """The pack's part of the global loss: the sum over its images of weight x image loss. Adds up over packs and
        ranks."""
        return (self.loss_I * batch.weight_I).sum()


def velocity_losses(network: Callable[..., Tensor], flow: FlowBatch, batch: PackedBatch) -> FlowLosses:
    velocity_TC = network(flow.x_TC, flow.t_I, flow.label_I, batch.packing)
    return FlowLosses(image_losses(velocity_TC, flow.target_TC, batch), flow.t_I)


def flow_loss(
    network: Callable[..., Tensor], batch: PackedBatch, config: FlowConfig, classes: int, seed: int
) -> Tensor:
    """This pack's part of the global loss."""
    return velocity_losses(network, make_flow_batch(batch, config, classes, seed), batch).weighted_sum(batch)
