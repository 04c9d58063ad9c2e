"""Tensor parallelism as arithmetic: which pieces of which tensors a rank of a tensor group holds. Imports no torch,
because `fitv2 submit` uses it to estimate the memory of a layout.

q, k and v are split by heads, the MLP by hidden units, so that a group adds up partial results twice per block: after
attention's projection and after the MLP's. Everything else, all conditioning included, is replicated: its gradient is
the same on all ranks of a group.

The group's size need not divide the width of FiTv2's SwiGLU (it does divide that of MLPs of 4 x hidden): some ranks
are then padded with units that do not exist. Their weights start at zero, which makes their gradients zero, so they
stay zero; they are in no checkpoint. Nor are they compared at a save (see ``checkpoint.copies``): such a unit gives
gate times value times its column of fc2, so a flipped bit in one of the three, or in a moment of it, meets a zero
factor in the output and in every gradient; and one bit makes 2.0 of a zero at most, never infinity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fitv2_scale.model.counts import LogicalParameter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class TensorGroup:
    """This rank's position in its tensor group; ``group`` is None for a group of one."""

    rank: int = 0
    size: int = 1
    group: "ProcessGroup | None" = None


@dataclass(frozen=True)
class Piece:
    """A rectangle of a logical tensor, and where it lies in a rank's tensor-parallel local tensor."""

    local: tuple[int, ...]  # offset in the local tensor
    offset: tuple[int, ...]  # offset in the logical tensor
    shape: tuple[int, ...]


def local_pieces(parameter: LogicalParameter, group: TensorGroup) -> list[Piece]:
    """What a rank of ``group`` holds of a logical tensor, and where in its local tensor."""
    shape = parameter.shape
    if group.size == 1 or parameter.cut == "whole":
        return [Piece((0,) * len(shape), (0,) * len(shape), shape)]
    if parameter.cut == "rows_of_thirds":
        each = shape[0] // 3
        return [p for k in range(3) for p in _split(shape, 0, k * each, each, group, k * (each // group.size))]
    dim = 1 if parameter.cut == "columns" else 0
    return _split(shape, dim, 0, shape[dim], group, 0)


def _split(shape: Sequence[int], dim: int, first: int, length: int, group: TensorGroup, local: int) -> list[Piece]:
    """The rank's part of [first, first + length) along ``dim``, at ``local`` in its tensor; the last are shorter."""
    each = -(-length // group.size)
    low, high = (min(length, k * each) for k in (group.rank, group.rank + 1))
    if low == high:
        return []

    def along(value: int, others: Sequence[int]) -> tuple[int, ...]:
        return tuple(value if d == dim else n for d, n in enumerate(others))

    zeros = (0,) * len(shape)
    return [Piece(along(local, zeros), along(first + low, zeros), along(high - low, shape))]
