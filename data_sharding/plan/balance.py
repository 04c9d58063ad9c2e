"""A step's images to ranks and packs: pure functions of (the step's set, ranks, shapes), the same on every rank.

Nothing here changes what a run learns; it decides how evenly the work falls and how little of a pack is padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapreplace
from itertools import pairwise

import numpy as np

_REPAIR_WORK = 1 << 21  # repairs times images: bounds the time that dealing a step takes
_TOLERANCE = 10  # a group within 2**-10 of the mean needs no repair
_PARTNERS = 64  # groups, the lightest, with which the dearest one's images are divided anew
_SPLIT_LIMIT = 10  # images in two groups up to which all their divisions are tried: 2**10 sums


Nodes = tuple[int, ...]  # ranks of each node, in their order; (R,) where no rank shares what it reads with another


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


def deal(tokens: np.ndarray, cost: Cost, nodes: Nodes, shapes: Sequence[Shape]) -> Dealt:
    """Images to ranks evenly in cost, each rank's to packs evenly in tokens: as few packs as the largest shape allows,
    in the smallest shape that holds them. ``shapes`` ascend."""
    members = spread_over_nodes(cost.of(tokens), nodes)
    largest = shapes[-1].tokens
    count = max(1, -(-max(int(tokens[m].sum()) for m in members) // largest))
    while True:
        packs = [[m[group] for group in spread(tokens[m], count)] for m in members]
        sizes = [(len(pack), int(tokens[pack].sum())) for rank in packs for pack in rank]
        for shape in shapes:
            if all(shape.holds(*size) for size in sizes):
                return Dealt(shape, packs)
        count += 1


def spread_over_nodes(cost: np.ndarray, nodes: Nodes) -> list[np.ndarray]:
    """Indices dealt to the ranks of all nodes. Each node gets a contiguous stretch, its share of the cost to within one
    image: as neighbours lie in the same frames, in every step, a node reads few frames that others read too."""
    before = np.concatenate(([0], np.cumsum(cost)))
    shares = np.cumsum((0, *nodes)) * int(before[-1])
    ends = [_nearest(before * sum(nodes), share) for share in shares.tolist()]
    stretches = zip(pairwise(ends), nodes, strict=True)
    return [first + group for (first, end), ranks in stretches for group in spread(cost[first:end], ranks)]


def _nearest(ascending: np.ndarray, value: int) -> int:
    """Index of the element nearest to ``value``, the first of several."""
    return int(np.abs(ascending - value).argmin())


def spread(cost: np.ndarray, groups: int) -> list[np.ndarray]:
    """Indices dealt to ``groups`` groups so that the dearest group is cheap; a group may be empty.

    Two beginnings, of which the better one stays: longest processing time first; and, where the count does not divide,
    the cheapest images to just those groups that must hold one more. Either is repaired.
    """
    enough = int(cost.sum()) // groups
    enough += enough >> _TOLERANCE
    group, load = _repaired(cost, *_longest_first(cost, groups), enough)
    each, more = divmod(len(cost), groups)
    if load.max() > enough and each and more:
        other = _repaired(cost, *_by_count(cost, groups, each, more), enough)
        if other[1].max() < load.max():
            group = other[0]
    by_group = np.argsort(group, kind="stable")
    return np.split(by_group, np.cumsum(np.bincount(group, minlength=groups))[:-1])


def _repaired(cost: np.ndarray, group: np.ndarray, load: np.ndarray, enough: int) -> tuple[np.ndarray, np.ndarray]:
    """``group`` and ``load`` after repairs: while it makes the dearest group cheaper, it exchanges one image for one,
    or for none, with another group; where no exchange helps and groups are small, the dearest group and another divide
    all their images anew in the best of all ways."""
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
    return group, load


def _by_count(cost: np.ndarray, groups: int, each: int, more: int) -> tuple[np.ndarray, np.ndarray]:
    """(group of each image, load of each group): the cheapest (each + 1) * more images to ``more`` groups, the others
    to the rest, either part longest first."""
    order = np.argsort(cost, kind="stable")
    cheap, dear = np.split(order, [(each + 1) * more])
    group, load = np.empty(len(cost), np.int64), np.empty(groups, np.int64)
    group[cheap], load[:more] = _longest_first(cost[cheap], more)
    group[dear], load[more:] = _longest_first(cost[dear], groups - more)
    group[dear] += more
    return group, load


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
