"""A step's images to ranks and packs: pure functions of (the step's set, ranks, shape), the same on every rank.

Nothing here changes what a run learns; it decides how evenly the work falls and how little of a pack is padding.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from heapq import heapify, heapreplace

import numpy as np

from data_sharding.errors import UserError

_ROUND = 64  # capacities are multiples of this


@dataclass(frozen=True)
class Cost:
    """Work of an image: linear * tokens + quadratic * tokens**2, in whole units. For a transformer of hidden size d
    the ratio is about 6 d : 1 (linears against attention)."""

    linear: int
    quadratic: int

    def of(self, tokens: np.ndarray) -> np.ndarray:
        return self.linear * tokens + self.quadratic * tokens * tokens


@dataclass(frozen=True)
class Shape:
    """The static shape of every pack of an attempt."""

    tokens: int  # capacity T
    images: int  # slots I, those for padding included
    max_seqlen: int  # the longest image; padding lies in further slots, in runs no longer than this

    def padding_slots(self, room: int) -> int:
        return -(-room // self.max_seqlen)


def deal(tokens: np.ndarray, cost: Cost, ranks: int, shape: Shape) -> list[list[np.ndarray]]:
    """``result[rank][pack]`` = indices into the step. Every rank has the same number of packs; some may be empty."""
    packs = [_best_fit(tokens, members, shape) for members in deal_to_ranks(cost.of(tokens), ranks)]
    count = max(len(p) for p in packs)
    empty = np.empty(0, np.int64)
    return [p + [empty] * (count - len(p)) for p in packs]


def deal_to_ranks(cost: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Longest processing time first: the dearest image left goes to the rank with the least work."""
    heap = [(0, rank) for rank in range(ranks)]
    heapify(heap)
    members: list[list[int]] = [[] for _ in range(ranks)]
    for i in np.argsort(-cost, kind="stable").tolist():
        work, rank = heap[0]
        members[rank].append(i)
        heapreplace(heap, (work + int(cost[i]), rank))
    return [np.array(m, np.int64) for m in members]


def _best_fit(tokens: np.ndarray, members: np.ndarray, shape: Shape) -> list[np.ndarray]:
    """Best fit decreasing: each image into the fullest open pack that still takes it. ``members`` come longest first
    whenever cost grows with length."""
    open_packs: list[tuple[int, int]] = []  # (room left, pack), sorted
    packs: list[list[int]] = []
    for i in members.tolist():
        length = int(tokens[i])
        place = bisect_left(open_packs, (length, -1))
        if place == len(open_packs):
            packs.append([i])
            room, pack = shape.tokens - length, len(packs) - 1
        else:
            room, pack = open_packs.pop(place)
            packs[pack].append(i)
            room -= length
        # One more image, of any length, must leave slots for the padding.
        if len(packs[pack]) + 1 + shape.padding_slots(room) <= shape.images:
            insort(open_packs, (room, pack))
    return [np.array(p, np.int64) for p in packs]


def choose_shape(steps: list[np.ndarray], cost: Cost, ranks: int, max_tokens: int, max_seqlen: int) -> Shape:
    """The fullest static shape for steps like these (token lengths of each step, one window of the plan).

    Takes the fewest packs a rank can do with at ``max_tokens`` a pack, then the smallest capacity at which all these
    steps fit that many. A later step that does not fit simply takes one pack more.
    """
    if ranks > len(steps[0]):
        raise UserError(
            f"{ranks} data-parallel ranks are more than the {len(steps[0])} images of a step: raise batch.images or "
            f"start at most {len(steps[0])} processes"
        )
    largest = max_tokens // _ROUND * _ROUND
    if max_seqlen > largest:
        raise UserError(f"layout.max_tokens is {max_tokens}, less than one image of {max_seqlen} tokens: raise it")
    dealt = [(tokens, deal_to_ranks(cost.of(tokens), ranks)) for tokens in steps]
    load = max(int(tokens[members].sum()) for tokens, ranks_ in dealt for members in ranks_)
    fewest = max(1, -(-load // largest))

    def packed(capacity: int) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        unlimited = Shape(capacity, len(steps[0]) + -(-capacity // max_seqlen) + 1, max_seqlen)
        return [(tokens, _best_fit(tokens, members, unlimited)) for tokens, ranks_ in dealt for members in ranks_]

    capacity = max(_round_up(-(-load // fewest)), _round_up(max_seqlen))
    while max(len(packs) for _, packs in packed(capacity)) > fewest:
        if capacity >= largest:
            fewest, capacity = fewest + 1, max(_round_up(-(-load // (fewest + 1))), _round_up(max_seqlen))
        else:
            capacity += _ROUND
    shape = Shape(capacity, 0, max_seqlen)
    slots = max(
        len(pack) + shape.padding_slots(capacity - int(tokens[pack].sum()))
        for tokens, packs in packed(capacity)
        for pack in packs
    )
    slots = max(slots + slots // 8, shape.padding_slots(capacity) + 1)  # an eighth more, for steps not looked at
    return Shape(capacity, slots, max_seqlen)


def _round_up(tokens: int) -> int:
    return -(-tokens // _ROUND) * _ROUND
