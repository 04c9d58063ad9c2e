"""The random numbers of an image that is trained on. Each is keyed by (seed, purpose, epoch, sample id), so it does not
depend on the pack and the rank that the image is assigned to."""

import torch
from torch import Tensor

from data_sharding.rng import Purpose
from fitv2_scale.model.packed_batch import PackedBatch
from fitv2_scale.model.rng import normal, uniform, words


def noise_words(
    purpose: Purpose, seed: int, epoch_T: Tensor | int, id_T: Tensor, place_T: Tensor, channels: int
) -> Tensor:
    """The integers from which noise is made: int64 (T, C), value ``C place + channel`` of each image's stream. C is a
    multiple of four, as each patch makes it."""
    blocks = channels // 4  # of four words
    block_TB = place_T[:, None] * blocks + torch.arange(blocks, device=place_T.device)
    epoch_T1 = epoch_T[:, None] if isinstance(epoch_T, Tensor) else epoch_T
    return words(seed, purpose, epoch_T1, id_T[:, None], block_TB).flatten(1)


def noise_of(batch: PackedBatch, purpose: Purpose, seed: int) -> Tensor:
    """Standard normal noise for the tokens of ``batch``: float32 (T, C)."""
    image_T, place_T = batch.packing.image_T, batch.packing.place_T
    epoch_T, id_T, channels = batch.epoch_I[image_T], batch.sample_id_I[image_T], batch.latents_TC.shape[1]
    return normal(noise_words(purpose, seed, epoch_T, id_T, place_T, channels)).float()


def first_words(purpose: Purpose, seed: int, epoch_I: Tensor, id_I: Tensor) -> Tensor:
    """The first four integers of each image's stream: int64 (I, 4)."""
    return words(seed, purpose, epoch_I, id_I, torch.zeros_like(id_I))


def first_uniform(purpose: Purpose, seed: int, epoch_I: Tensor, id_I: Tensor) -> Tensor:
    """A number in (0, 1) for each image: float64 (I,)."""
    return uniform(first_words(purpose, seed, epoch_I, id_I)[:, 0])


def labels_or_none(batch: PackedBatch, dropout: float, classes: int, seed: int) -> Tensor:
    """The label that each image is trained with: int64 (I,); ``classes``, which is no class, for a fraction ``dropout``
    of the images."""
    drop_I = first_uniform(Purpose.LABEL_DROP, seed, batch.epoch_I, batch.sample_id_I) < dropout
    return batch.label_I.masked_fill(drop_I, classes)
