"""What a rank is handed for one step: packs of static shape, made of the samples that were read."""

from dataclasses import dataclass

import numpy as np

from data_sharding.errors import DataError
from data_sharding.format.shard import DTYPE
from data_sharding.plan.balance import Cost, PackAssignment
from data_sharding.plan.pack_layout import PackLayout, PackShape, lay_out
from data_sharding.plan.plan import StepSet

TOKEN_BYTES = 16 * 2 + 4 * 8  # of a pack: latents, and where the token lies


@dataclass(frozen=True)
class Pack:
    """One packed batch of images: T tokens, I image slots."""

    layout: PackLayout
    latents: np.ndarray  # float16 (T, 16) as stored, zero at padding
    label: np.ndarray  # int64 (I,), of the image that was read
    weight: np.ndarray  # float32 (I,), 1 / images of the step, 0 at padding
    sample_id: np.ndarray  # int64 (I,), of the image that was planned; 0 at padding
    epoch: np.ndarray  # int64 (I,)


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of one step, and what all ranks know of the whole step."""

    step: int
    packs: list[Pack]
    id_sum: int  # of this rank's planned images: sum of hashed ids modulo 2**64, signed
    step_id_sum: int  # of the step, from the plan
    step_lengths: np.ndarray  # int64, tokens of each image of the step
    step_capacity: int  # tokens that the packs of all ranks have room for
    step_cost_max: int  # of the slowest rank, in the units of Cost
    step_cost_mean: float
    step_substituted: int  # images of the step that were replaced

    @property
    def step_images(self) -> int:
        return len(self.step_lengths)

    @property
    def step_tokens(self) -> int:
        return int(self.step_lengths.sum())


def make_batch(
    step: int,
    images: StepSet,
    assignment: PackAssignment,
    cost: Cost,
    rank: int,
    arrays: dict[int, np.ndarray],
    substituted: int,
) -> StepBatch:
    """The part of ``rank``; ``arrays`` holds the chosen view of its images, both flips, by their index into the step.

    Raises:
        DataError: shorter substitutes leave a pack more padding than it has slots for.
    """
    mine = assignment.packs[rank]
    work = cost.of(images.tokens)
    loads = [sum(int(work[pack].sum()) for pack in packs) for packs in assignment.packs]
    return StepBatch(
        step=step,
        packs=[_make_pack(images, members, arrays, assignment.shape) for members in mine],
        id_sum=images.id_sum(np.concatenate(mine)),
        step_id_sum=images.id_sum(slice(None)),
        step_lengths=images.tokens,
        step_capacity=len(loads) * len(mine) * assignment.shape.tokens,
        step_cost_max=max(loads),
        step_cost_mean=sum(loads) / len(loads),
        step_substituted=substituted,
    )


def _make_pack(images: StepSet, members: np.ndarray, arrays: dict[int, np.ndarray], shape: PackShape) -> Pack:
    chosen = [arrays[i][flip] for i, flip in zip(members.tolist(), images.flip[members].tolist(), strict=True)]
    if not shape.holds(len(chosen), sum(a.shape[0] * a.shape[1] for a in chosen)):  # each (h, w, 16)
        raise DataError(  # of what is planned all fits; only a shorter substitute leaves more to pad
            "an image that cannot be read has only shorter ones to stand in for it, and its pack no slot left for "
            "the padding: restore the shards that the run's ledger names"
        )
    layout = lay_out([a.shape[:2] for a in chosen], shape)
    latents = np.zeros((shape.tokens, 16), DTYPE)
    if chosen:
        np.concatenate([a.reshape(-1, 16) for a in chosen], out=latents[: layout.tokens])

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
