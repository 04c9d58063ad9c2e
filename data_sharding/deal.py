"""A step's images to ranks and packs: pure functions of (the step's set, ranks, shapes), the same on every rank.

Nothing here changes what a run learns; it decides how evenly the work falls and how little of a pack is padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapreplace

import numpy as np

from data_sharding.errors import UserError

_ROUND = 8  # capacities are multiples of this
_REPAIR_WORK = 1 << 21  # repairs times images: bounds the time that dealing a step takes
_TOLERANCE = 10  # a group within 2**-10 of the mean needs no repair
_PARTNERS = 64  # groups, the lightest, with which the dearest one's images are divided anew
_SPLIT_LIMIT = 10  # images in two groups up to which all their divisions are tried: 2**10 sums


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
    """A static shape of packs."""

    tokens: int  # capacity T
    images: int  # slots I, those for padding included
    max_seqlen: int  # the longest image; padding lies in further slots, in runs no longer than this

    def padding_slots(self, room: int) -> int:
        return -(-room // self.max_seqlen)

    def holds(self, images: int, tokens: int) -> bool:
        room = self.tokens - tokens
        return room >= 0 and images + self.padding_slots(room) <= self.images


@dataclass(frozen=True)
class Dealt:
    """``packs[rank][pack]`` = indices into the step. All ranks have as many packs, all of ``shape``, some empty."""

    shape: Shape
    packs: list[list[np.ndarray]]


def deal(tokens: np.ndarray, cost: Cost, ranks: int, shapes: Sequence[Shape]) -> Dealt:
    """Images to ranks evenly in cost, each rank's to packs evenly in tokens: as few packs as the largest shape allows,
    in the smallest shape that holds them. ``shapes`` ascend."""
    members = spread(cost.of(tokens), ranks)
    largest = shapes[-1].tokens
    count = max(1, -(-max(int(tokens[m].sum()) for m in members) // largest))
    while True:
        packs = [[m[group] for group in spread(tokens[m], count)] for m in members]
        sizes = [(len(pack), int(tokens[pack].sum())) for rank in packs for pack in rank]
        for shape in shapes:
            if all(shape.holds(*size) for size in sizes):
                return Dealt(shape, packs)
        count += 1


def spread(cost: np.ndarray, groups: int) -> list[np.ndarray]:
    """Indices dealt to ``groups`` groups so that the dearest group is cheap; a group may be empty.

    Longest processing time first, then repair: while it makes the dearest group cheaper, it exchanges one image for
    one, or for none, with another group; where no exchange helps and groups are small, the dearest group and another
    divide all their images anew in the best of all ways.
    """
    group, load = _longest_first(cost, groups)
    enough = int(load.sum()) // groups
    enough += enough >> _TOLERANCE
    for _ in range(_REPAIR_WORK // max(1, len(cost))):
        dearest = int(load.argmax())
        if load[dearest] <= enough:
            break
        found = _best_exchange(cost, group, load, dearest)
        if found is None:
            found = _best_division(cost, group, load, dearest)
        if found is None:
            break
        images, targets = found
        np.subtract.at(load, group[images], cost[images])
        np.add.at(load, targets, cost[images])
        group[images] = targets
    by_group = np.argsort(group, kind="stable")
    return np.split(by_group, np.cumsum(np.bincount(group, minlength=groups))[:-1])


def _longest_first(cost: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(group of each image, load of each group)."""
    heap = [(0, g) for g in range(groups)]
    group = np.empty(len(cost), np.int64)
    order = np.argsort(-cost, kind="stable")
    for i, c in zip(order.tolist(), cost[order].tolist(), strict=True):
        work, g = heap[0]
        group[i] = g
        heapreplace(heap, (work + c, g))
    load = np.zeros(groups, np.int64)
    np.add.at(load, group, cost)
    return group, load


Change = tuple[np.ndarray, np.ndarray]  # images, and the group that each goes to


def _best_exchange(cost: np.ndarray, group: np.ndarray, load: np.ndarray, dearest: int) -> Change | None:
    """One image of the dearest group against one of another group, or against none; None if neither helps."""
    mine, most = np.flatnonzero(group == dearest), load[dearest]
    given = cost[mine][:, None] - cost[None, :]
    after = np.maximum(most - given, load[group][None, :] + given)
    after[:, mine] = most
    i, j = np.unravel_index(after.argmin(), after.shape)
    lightest = int(load.argmin())
    moved = np.maximum(most - cost[mine], load[lightest] + cost[mine])
    k = int(moved.argmin())
    if min(after[i, j], moved[k]) >= most:
        return None
    if moved[k] < after[i, j]:
        return mine[k : k + 1], np.array([lightest])
    return np.array([mine[i], j]), np.array([group[j], dearest])


def _best_division(cost: np.ndarray, group: np.ndarray, load: np.ndarray, dearest: int) -> Change | None:
    """All images of the dearest group and of a light one, divided between the two in the best way; None if none helps,
    or if there are too many ways."""
    counts = np.bincount(group, minlength=len(load))
    width = int(counts.max())
    if counts[dearest] + width > _SPLIT_LIMIT:
        return None
    slot = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((len(load), width), -1, np.int64)  # the images of each group
    by_group = np.argsort(group, kind="stable")
    table[group[by_group], slot] = by_group
    others = np.argsort(load, kind="stable")[:_PARTNERS]
    others = others[others != dearest]
    if not len(others):
        return None
    mine = table[dearest][table[dearest] >= 0]
    pool = np.concatenate((np.broadcast_to(mine, (len(others), len(mine))), table[others]), 1)
    value = np.where(pool >= 0, cost[pool], 0).astype(np.float64)  # whole numbers below 2**53: sums are exact
    subsets = _subsets(pool.shape[1])
    kept = value @ subsets  # (others, 2 ** images)
    after = np.maximum(kept, value.sum(1, keepdims=True) - kept)
    row, subset = np.unravel_index(after.argmin(), after.shape)
    if after[row, subset] >= load[dearest]:
        return None
    images = pool[row]
    targets = np.where(subsets[:, subset] > 0, dearest, others[row])
    return images[images >= 0], targets[images >= 0]


@lru_cache(maxsize=_SPLIT_LIMIT)
def _subsets(n: int) -> np.ndarray:
    """All subsets of n things as columns of 0 and 1: float64 (n, 2**n)."""
    return (np.arange(1 << n)[None, :] >> np.arange(n)[:, None] & 1).astype(np.float64)


def choose_shapes(
    steps: list[np.ndarray], cost: Cost, ranks: int, max_tokens: int, max_seqlen: int
) -> tuple[Shape, ...]:
    """Up to three static shapes, ascending, for steps like these (token lengths of each step, one window of the plan).

    Packs are as few as ``max_tokens`` allows. Each step uses the smallest shape that holds it; the capacities are those
    that waste least over these steps, and one with headroom for steps not looked at. A step that fits none takes one
    pack more.
    """
    if ranks > len(steps[0]):
        raise UserError(
            f"{ranks} data-parallel ranks are more than the {len(steps[0])} images of a step: raise batch.images or "
            f"start at most {len(steps[0])} processes"
        )
    largest = max_tokens // _ROUND * _ROUND
    if max_seqlen > largest:
        raise UserError(f"layout.max_tokens is {max_tokens}, less than one image of {max_seqlen} tokens: raise it")
    dealt = [(tokens, spread(cost.of(tokens), ranks)) for tokens in steps]
    load = max(int(tokens[m].sum()) for tokens, members in dealt for m in members)
    count = max(1, -(-load // largest))
    while True:
        packs = [[(t[m][group]) for m in members for group in spread(t[m], count)] for t, members in dealt]
        needs = np.array([max(int(pack.sum()) for pack in step) for step in packs])
        if needs.max() <= largest:
            break
        count += 1
    capacities = _capacities(needs, max_seqlen)
    roomy = min(largest, _round_up(capacities[-1] + capacities[-1] // 16))
    return tuple(
        Shape(capacity, _slots(packs, capacity, max_seqlen), max_seqlen) for capacity in sorted({*capacities, roomy})
    )


def _slots(packs: list[list[np.ndarray]], capacity: int, max_seqlen: int) -> int:
    """Image slots that packs of ``capacity`` tokens need, padding included; at least those of a nearly empty one."""
    shape = Shape(capacity, 0, max_seqlen)
    rooms = [(len(pack), capacity - int(pack.sum())) for step in packs for pack in step]
    most = max(images + shape.padding_slots(room) for images, room in rooms if room >= 0)
    return max(most + most // 8, shape.padding_slots(capacity)) + 1  # an eighth more, for steps not looked at


def _capacities(needs: np.ndarray, least: int) -> list[int]:
    """At most two capacities, ascending, the last holding every need, with the least sum over needs of the smaller one
    that holds it."""
    rounded = [_round_up(max(int(need), least)) for need in needs]
    candidates, counts = np.unique(rounded, return_counts=True)
    held, last = np.cumsum(counts), len(candidates) - 1
    total = candidates[:last] * held[:last] + candidates[last] * (len(needs) - held[:last])
    if last == 0:
        return [int(candidates[0])]
    return [int(candidates[total.argmin()]), int(candidates[last])]


def _round_up(tokens: int) -> int:
    return -(-tokens // _ROUND) * _ROUND
