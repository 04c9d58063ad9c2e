"""The boxes of many ranks as numbers: millions of them are checked and listed in seconds.

A table has a row per box, int64: the number of its tensor, its offset and its shape, the offset of its first byte in
the rank's file. Offsets and shapes have as many columns as the largest number of dims; those of tensors with fewer are
filled up with an offset of 0 and a length of 1.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]  # by name; tensors are numbered in this order


def table_of(shapes: Shapes, boxes: Iterable[tuple[int, Sequence[int], Sequence[int], int]]) -> np.ndarray:
    """The table of ``boxes``: number of the tensor, offset, shape, first byte."""
    dims = _dims(shapes)
    rows = [
        [n, *offset, *[0] * (dims - len(offset)), *shape, *[1] * (dims - len(shape)), begin]
        for n, offset, shape, begin in boxes
    ]
    return np.array(rows, np.int64).reshape(-1, 2 + 2 * dims)


def require_covered(shapes: Shapes, tables: Iterable[np.ndarray]) -> None:
    """Raises ValueError, with the tensor's name, unless the boxes of each tensor are all of it, each element once.

    They are if their indicator functions add up to that of the tensor, so if the differences of these functions along
    all dims do. A box's difference is 1 or -1 at each of its corners, and 0 elsewhere: the corners of one sign, of
    boxes and tensors together, must be those of the other. Sorting shows it.
    """
    names = list(shapes)
    whole = table_of(shapes, [(n, (), shape, 0) for n, shape in enumerate(shapes.values())])
    full = _columns(whole)[2]
    first_key = np.concatenate([[0], np.cumsum((full + 1).prod(0))])
    minus, plus = _corners(whole, full, first_key)  # of the other sign than the boxes'
    pluses, minuses = [plus], [minus]
    for table in tables:
        number, start, size = _columns(table)
        if len(outside := number[((start < 0) | (size < 0) | (start + size > full[:, number])).any(0)]):
            raise ValueError(f"a box of {names[outside[0]]} lies outside of it: it cannot be saved")
        plus, minus = _corners(table, full, first_key)
        pluses.append(plus)
        minuses.append(minus)
    left, right = np.sort(np.concatenate(pluses)), np.sort(np.concatenate(minuses))
    if len(differing := np.flatnonzero(left != right)):
        key = min(left[differing[0]], right[differing[0]])
        name = names[np.searchsorted(first_key, key, side="right") - 1]
        raise ValueError(f"the boxes of {name} on all ranks are not each element of it, once: it cannot be saved")


def _columns(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of the tensor (boxes,), offset and shape (dims, boxes)."""
    columns = np.ascontiguousarray(table.T)
    dims = len(columns) // 2 - 1
    return columns[0], columns[1 : 1 + dims], columns[1 + dims : 1 + 2 * dims]


def _corners(table: np.ndarray, full: np.ndarray, first_key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The corners of boxes at which the differences along all dims are 1, and those at which they are -1. A point is a
    number: ``first_key`` of its tensor, and more by its place in that, whose shape is a column of ``full``."""
    number, start, size = _columns(table)
    key, stride = first_key[number], np.ones_like(number)
    plus, minus = [np.zeros_like(number)], list[np.ndarray]()
    for dim in reversed(range(len(full))):
        key, step = key + start[dim] * stride, size[dim] * stride
        plus, minus = plus + [corner + step for corner in minus], minus + [corner + step for corner in plus]
        stride = stride * (full[dim, number] + 1)  # a corner may lie at the end
    return np.concatenate([key + corner for corner in plus]), np.concatenate([key + corner for corner in minus])


def tensors_json(shapes: Shapes, tables: Mapping[int, np.ndarray], file: str) -> bytes:
    """The manifest's "tensors" (see ``commit_files``) of the boxes in the ``tables`` of some ranks, as ``json.dumps``
    writes them; ``file`` % rank is the name of a rank's file. Tensors are in the order in which they first occur."""
    table = np.concatenate(list(tables.values()))
    ranks = np.repeat(list(tables), [len(one) for one in tables.values()])
    numbers, first = np.unique(table[:, 0], return_index=True)
    place = np.zeros(len(shapes), np.int64)
    place[numbers[np.argsort(first)]] = np.arange(len(numbers))
    order = np.argsort(place[table[:, 0]], kind="stable")
    bounds = np.flatnonzero(np.diff(table[order, 0], prepend=-1, append=-1))
    named, texts = list(shapes.items()), []
    for low, high in pairwise(bounds):
        rows = order[low:high]
        name, shape = named[table[rows[0], 0]]
        texts.append(_text(name, shape, table[rows], ranks[rows], file))
    return b"{" + b", ".join(texts) + b"}"


def _text(name: str, shape: Sequence[int], table: np.ndarray, ranks: np.ndarray, file: str) -> bytes:
    """A tensor and the boxes of its ``table``."""
    dims, used = table.shape[1] // 2 - 1, len(shape)
    offsets, lengths = table[:, 1 : 1 + used], table[:, 1 + dims : 1 + dims + used]
    values = np.hstack([offsets, lengths, ranks[:, None], table[:, -1:]])
    numbers = ", ".join(["%d"] * used)
    box = f'{{"offset": [{numbers}], "shape": [{numbers}], "file": "{file}", "begin": %d}}'
    boxes = ", ".join([box] * len(table)) % tuple(values.ravel().tolist())
    return f'{json.dumps(name)}: {{"shape": {json.dumps(list(shape))}, "boxes": [{boxes}]}}'.encode()


def _dims(shapes: Shapes) -> int:
    return max([1, *(len(shape) for shape in shapes.values())])
