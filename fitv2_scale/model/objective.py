"""What a network is trained to do, as an interface; ``objectives.py`` has the table of them.

The loss is the released one: the mean over an image's valid tokens and channels, then over the images of the global
batch, so that every image has the same weight, however many tokens it has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fitv2_scale.model.packed_batch import PackedBatch

VALIDATION_SEED = 0  # of the noise of validation, in every run


@dataclass(frozen=True)
class NoisedBatch:
    """The network's input for one pack, and its target."""

    x_TC: Tensor  # float32 (T, C), noised tokens
    target_TC: Tensor  # float32 (T, C), what the network is to predict
    t_I: Tensor  # float32 (I,), the time as the network is given it
    label_I: Tensor  # int64 (I,), dropped labels replaced by the number of classes


@dataclass(frozen=True)
class ImageLosses:
    """The loss of each image of a pack, with its gradient, and how little noise it had; both float32 (I,)."""

    loss_I: Tensor
    time_I: Tensor  # 0: noise alone, 1: no noise

    def weighted_sum(self, batch: PackedBatch) -> Tensor:
        """The pack's part of the global loss: the sum over its images of weight x image loss. Adds up over packs and
        ranks."""
        return (self.loss_I * batch.weight_I).sum()


class Objective(Protocol):
    def training_batch(self, batch: PackedBatch) -> NoisedBatch:
        """``batch`` with the time, noise and dropped label of each image, which its epoch and id decide."""
        ...

    def validation_batch(self, batch: PackedBatch, u_I: Tensor) -> NoisedBatch:
        """``batch`` with its labels and the noise of validation. ``u_I``, float64 (I,) in (0, 1), says how little: near
        0 is noise, near 1 the image."""
        ...

    def losses(self, network: Callable[..., Tensor], noised: NoisedBatch, batch: PackedBatch) -> ImageLosses:
        """Of what ``network`` makes of ``noised``, which is ``batch`` with noise."""
        ...


def image_means(values_TC: Tensor, batch: PackedBatch) -> Tensor:
    """The mean over each image's tokens and channels, float32 (I,); empty slots give 0."""
    lengths_I = batch.packing.cu_seqlens_I1.diff().clamp(min=1)
    return torch.zeros_like(batch.weight_I).index_add(0, batch.packing.image_T, values_TC.mean(-1)) / lengths_I


def pack_loss(objective: Objective, network: Callable[..., Tensor], batch: PackedBatch) -> Tensor:
    """This pack's part of the global loss."""
    return objective.losses(network, objective.training_batch(batch), batch).weighted_sum(batch)
