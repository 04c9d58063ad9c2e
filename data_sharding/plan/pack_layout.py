"""The layout of a pack of static shape: images one after the other, then padding, then empty slots."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

Count = TypeVar("Count", int, np.ndarray)


@dataclass(frozen=True)
class PackShape:
    """A static shape of packs: compiled kernels see one program per shape."""

    tokens: int  # capacity T
    images: int  # slots I, including those for padding
    max_seqlen: int  # of the longest image; padding takes further slots, each of at most this many tokens

    def padding_slots(self, room: Count) -> Count:
        """Slots that ``room`` tokens of padding take."""
        return -(-room // self.max_seqlen)

    def holds(self, images: Count, tokens: Count) -> bool:
        """Whether each pack of this shape has room for its ``images`` images of ``tokens`` tokens in total."""
        room = self.tokens - tokens
        return bool(np.all((room >= 0) & (images + self.padding_slots(room) <= self.images)))


@dataclass(frozen=True)
class PackLayout:
    """T tokens, I image slots. Padding takes the slots after the images, each of at most ``max_seqlen`` tokens."""

    cu_seqlens: np.ndarray  # int32 (I + 1,), last = T
    image: np.ndarray  # int64 (T,), slot of each token
    place: np.ndarray  # int64 (T,), index of the token in its image, row-major
    positions: np.ndarray  # int64 (T, 3), (time, row, column); time is 0, and all of padding
    max_seqlen: int
    tokens: int  # valid ones, the first of T


def lay_out(sizes: Sequence[tuple[int, int]], shape: PackShape) -> PackLayout:
    """The layout of images of ``sizes`` (rows, columns in tokens), in this order. They must fit."""
    lengths, positions = np.zeros(shape.images, np.int64), np.zeros((shape.tokens, 3), np.int64)
    lengths[: len(sizes)] = [rows * columns for rows, columns in sizes]
    at = int(lengths.sum())
    assert at <= shape.tokens and len(sizes) + shape.padding_slots(shape.tokens - at) <= shape.images
    if sizes:
        np.concatenate([_positions(rows, columns) for rows, columns in sizes], out=positions[:at])
    for slot, start in enumerate(range(at, shape.tokens, shape.max_seqlen), len(sizes)):
        lengths[slot] = min(shape.max_seqlen, shape.tokens - start)
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    image = np.repeat(np.arange(shape.images), lengths)
    return PackLayout(
        cu_seqlens=cu_seqlens.astype(np.int32),
        image=image,
        place=np.arange(shape.tokens) - np.repeat(cu_seqlens[:-1], lengths),
        positions=positions,
        max_seqlen=shape.max_seqlen,
        tokens=at,
    )


@lru_cache(maxsize=4096)  # one entry per size of a view
def _positions(rows: int, columns: int) -> np.ndarray:
    """int64 (rows * columns, 3), row-major."""
    return np.ascontiguousarray(np.indices((1, rows, columns)).reshape(3, -1).T)
