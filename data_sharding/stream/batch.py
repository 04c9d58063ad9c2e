"""The batch of one rank for one step: packs of static shape, made from the samples that were read."""

from dataclasses import dataclass

import numpy as np

from data_sharding.errors import DataError
from data_sharding.format.stored_array import DTYPE
from data_sharding.plan.balance import Cost, PackAssignment
from data_sharding.plan.pack_layout import PackLayout, PackShape, lay_out
from data_sharding.plan.plan import StepSet
from data_sharding.plan.token_grid import STORED_TOKENS, TokenGrid

_LAYOUT_BYTES = 5 * 8  # of a token: its image, its place there, and its position


def token_bytes(token_grid: TokenGrid) -> int:
    """Of a token in a pack: its latents, and its part of the layout."""
    return token_grid.channels * np.dtype(DTYPE).itemsize + _LAYOUT_BYTES


@dataclass(frozen=True)
class Pack:
    """One packed batch of images: T tokens, I image slots."""

    layout: PackLayout
    latents: np.ndarray  # float16 (T, channels of a token) as stored, zero at padding
    label: np.ndarray  # int64 (I,), of the image that was read (a substitute's own)
    weight: np.ndarray  # float32 (I,), 1 / images of the step, 0 at padding
    sample_id: np.ndarray  # int64 (I,), of the image that was planned; 0 at padding
    epoch: np.ndarray  # int64 (I,)


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of one step, and figures of the whole step, which are the same on all ranks."""

    step: int
    packs: list[Pack]
    id_sum: int  # of this rank's planned images: sum of hashed ids modulo 2**64, signed
    step_id_sum: int  # the same sum over the whole step, from the plan
    step_lengths: np.ndarray  # int64, tokens of each image of the step
    step_capacity: int  # tokens that the packs of all ranks have room for
    step_cost_max: int  # of the slowest rank, in the units of Cost
    step_cost_mean: float
    step_substituted: int  # images of the step that were replaced

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and image slots of each of its packs, on all ranks: what compiled kernels see."""
        return len(self.packs[0].latents), len(self.packs[0].weight)

    @property
    def step_images(self) -> int:
        """Images of the step, over all ranks."""
        return len(self.step_lengths)

    @property
    def step_tokens(self) -> int:
        """Tokens of the step without padding, over all ranks."""
        return int(self.step_lengths.sum())


def make_batch(
    step: int,
    images: StepSet,
    assignment: PackAssignment,
    cost: Cost,
    rank: int,
    arrays: dict[int, np.ndarray],
    substituted: int,
    token_grid: TokenGrid = STORED_TOKENS,
) -> StepBatch:
    """The batch of ``rank``. ``arrays`` holds the chosen view of each of its images as stored, float16 (2 flips, h, w,
    channels of a stored token), by their index into the step; ``substituted`` counts the replaced images of the step.

    Raises:
        DataError: substitutes are shorter than planned, and a pack has too few slots for the extra padding.
    """
    mine = assignment.packs_of(rank)
    loads = assignment.loads(cost.of(images.tokens))
    return StepBatch(
        step=step,
        packs=[_make_pack(images, members, arrays, assignment.shape, token_grid) for members in mine],
        id_sum=images.id_sum(np.concatenate(mine)),
        step_id_sum=images.id_sum(slice(None)),
        step_lengths=images.tokens,
        step_capacity=len(loads) * len(mine) * assignment.shape.tokens,
        step_cost_max=int(loads.max()),
        step_cost_mean=int(loads.sum()) / len(loads),
        step_substituted=substituted,
    )


def _make_pack(
    images: StepSet, members: np.ndarray, arrays: dict[int, np.ndarray], shape: PackShape, token_grid: TokenGrid
) -> Pack:
    flips = images.flip[members].tolist()
    chosen = [token_grid.group(arrays[i][flip]) for i, flip in zip(members.tolist(), flips, strict=True)]
    if not shape.holds(len(chosen), sum(a.shape[0] * a.shape[1] for a in chosen)):  # each (rows, columns, channels)
        raise DataError(  # the planned images always fit; only a shorter substitute needs more padding
            "an image that cannot be read was replaced by a shorter one, and its pack has no slot left for the extra "
            "padding: restore the damaged shards (`fitv2 shard verify` lists them)"
        )
    layout = lay_out([a.shape[:2] for a in chosen], shape)
    latents = np.zeros((shape.tokens, token_grid.channels), DTYPE)
    if chosen:
        np.concatenate([a.reshape(-1, token_grid.channels) for a in chosen], out=latents[: layout.tokens])

    def slots(values: np.ndarray, dtype: type) -> np.ndarray:
        out = np.zeros(shape.images, dtype)
        out[: len(members)] = values
        return out

    return Pack(
        layout=layout,
        latents=latents,
        label=slots(images.label[members], np.int64),
        weight=slots(np.full(len(members), 1 / len(images.tokens)), np.float32),
        sample_id=slots(images.sample_id[members], np.int64),
        epoch=slots(images.epoch[members], np.int64),
    )
