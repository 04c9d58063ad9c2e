"""Which parts of which logical tensors a rank holds.

A box is a rectangle of a logical tensor: its offset in global coordinates and a live view of the local memory. Any
sharding is a list of boxes; checkpoints are written and read as boxes only.

There are two steps from a logical tensor to what a rank holds. Tensor parallelism gives a rank *pieces* of it, placed
in a local tensor; the engine then keeps a part of that local tensor: some of its rows, or a range of its elements.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from fitv2_scale.parallel.tensor_pieces import Piece


@dataclass(frozen=True)
class Box:
    offset: tuple[int, ...]
    tensor: Tensor  # a view, perhaps strided: reading a checkpoint writes into it


@dataclass(frozen=True)
class LogicalTensor:
    """One tensor of the run in its public shape, and this rank's boxes of it (perhaps none)."""

    shape: tuple[int, ...]
    boxes: list[Box]
    split: bool = False  # whether the ranks of a tensor group hold different parts of it


def rows_boxes(
    pieces: Sequence[Piece], shape: Sequence[int], rows: Tensor, first_row: int, split: bool = False
) -> LogicalTensor:
    """The boxes of ``rows``, a rank's rows of the local tensor from ``first_row`` on (a shard of FSDP2)."""
    start = (first_row,) + (0,) * (rows.dim() - 1)
    return LogicalTensor(tuple(shape), list(_boxes(pieces, start, rows)), split)


def flat_boxes(
    pieces: Sequence[Piece],
    shape: Sequence[int],
    local_shape: Sequence[int],
    flat: Tensor,
    start: int,
    split: bool = False,
) -> LogicalTensor:
    """The boxes of ``flat``, elements ``start`` and on of the flattened local tensor (a partition of ZeRO-3).

    ``flat`` may be longer than what is left of the local tensor; the rest is padding and in no box.
    """
    boxes: list[Box] = []
    for offset, view in _rectangles(local_shape, flat, start):
        boxes += _boxes(pieces, offset, view)
    return LogicalTensor(tuple(shape), boxes, split)


def _boxes(pieces: Sequence[Piece], start: tuple[int, ...], view: Tensor) -> Iterator[Box]:
    """The part of each piece that lies in the rectangle ``view``, at ``start`` in the local tensor."""
    for piece in pieces:
        low = [max(s, p) for s, p in zip(start, piece.local, strict=True)]
        high = [min(s + n, p + m) for s, n, p, m in zip(start, view.shape, piece.local, piece.shape, strict=True)]
        if all(a < b for a, b in zip(low, high, strict=True)):
            part = view[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))]
            yield Box(tuple(o + a - p for o, a, p in zip(piece.offset, low, piece.local, strict=True)), part)


def _rectangles(local_shape: Sequence[int], flat: Tensor, start: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """(offset, view) of the rectangles that make up a range of the elements of a local vector or matrix: the end of a
    row, whole rows, the beginning of a row."""
    if len(local_shape) == 1:
        yield (start,), flat[: max(0, local_shape[0] - start)]
        return
    rows, columns = local_shape
    at, stop = start, min(start + flat.numel(), rows * columns)
    while at < stop:
        row, column = divmod(at, columns)
        if column or stop - at < columns:
            end = min(stop, (row + 1) * columns)
            yield (row, column), flat[at - start : end - start].view(1, -1)
        else:
            end = at + (stop - at) // columns * columns
            yield (row, 0), flat[at - start : end - start].view(-1, columns)
        at = end
