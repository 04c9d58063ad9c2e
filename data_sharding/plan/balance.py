"""A step's images to ranks and packs: pure functions of (the step's images, ranks, shapes), the same on every rank.

Nothing here changes what a run learns. It decides how evenly the work is divided, and how much of a pack is padding.

The problem is multiway number partitioning: costs into a given number of groups, so that the largest sum is small. The
method is greedy LPT (longest processing time first), then local search: swaps of two images between the most expensive
group and another one and, in small groups, the best of all two-way splits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapreplace
from itertools import pairwise

import numpy as np

from data_sharding.plan.pack_layout import PackShape

_SEARCH_WORK = 1 << 21  # iterations of the local search times images: bounds the time that a step takes
_TOLERANCE = 10  # a largest sum within 2**-10 of the mean is good enough
_PARTNERS = 64  # groups, the cheapest, that are tried in two-way splits with the most expensive one
_SPLIT_LIMIT = 10  # images in two groups up to which all their splits are tried: 2**10 sums


Nodes = tuple[int, ...]  # ranks of each node, in their order; (R,) if no rank shares what it reads with another


@dataclass(frozen=True)
class Cost:
    """Work of an image: linear * tokens + quadratic * tokens**2, in whole units."""

    linear: int
    quadratic: int

    @classmethod
    def transformer(cls, hidden: int) -> "Cost":
        """Of a transformer block of hidden size d on an image of l tokens: its multiply-adds, 12 d^2 l + 2 d l^2, in
        units of 2 d."""
        return cls(linear=6 * hidden, quadratic=1)

    def of(self, tokens: np.ndarray) -> np.ndarray:
        """The cost of images of ``tokens`` (int64), in the same shape."""
        return self.linear * tokens + self.quadratic * tokens * tokens


@dataclass(frozen=True)
class PackAssignment:
    """``packs[rank][pack]`` = indices into the step. All ranks have as many packs, all of ``shape``, some empty."""

    shape: PackShape
    packs: list[list[np.ndarray]]


def assign_packs(tokens: np.ndarray, cost: Cost, nodes: Nodes, shapes: Sequence[PackShape]) -> PackAssignment:
    """Divides a step's images among ranks evenly in cost, and each rank's among packs evenly in tokens.

    ``tokens`` is int64 (B,), the length of each image. Packs are as few as the largest of ``shapes`` (ascending)
    allows, of the smallest shape that holds them all.
    """
    members = partition_over_nodes(cost.of(tokens), nodes)
    largest = shapes[-1].tokens
    count = max(1, -(-max(int(tokens[m].sum()) for m in members) // largest))
    while True:
        packs = [[m[group] for group in partition(tokens[m], count)] for m in members]
        sizes = [(len(pack), int(tokens[pack].sum())) for rank in packs for pack in rank]
        for shape in shapes:
            if all(shape.holds(*size) for size in sizes):
                return PackAssignment(shape, packs)
        count += 1


def partition_over_nodes(cost: np.ndarray, nodes: Nodes) -> list[np.ndarray]:
    """The indices of each rank's images, node by node.

    Each node gets a contiguous range of images, of the cost that its ranks are due to within one image. Neighbours lie
    in the same frames, in every step, so a node reads few frames that others read too.
    """
    before = np.concatenate(([0], np.cumsum(cost)))
    due = np.cumsum((0, *nodes)) * int(before[-1])
    ends = [_nearest(before * sum(nodes), value) for value in due.tolist()]
    ranges = zip(pairwise(ends), nodes, strict=True)
    return [first + group for (first, end), ranks in ranges for group in partition(cost[first:end], ranks)]


def _nearest(ascending: np.ndarray, value: int) -> int:
    """Index of the element nearest to ``value``, the first of several."""
    return int(np.abs(ascending - value).argmin())


def partition(cost: np.ndarray, groups: int) -> list[np.ndarray]:
    """Indices of the images of each of ``groups`` groups, such that the largest sum of costs is small; a group may be
    empty.

    Starts from greedy LPT and, where the count of images does not divide, also from a partition in which the groups
    that must hold one image more get the cheapest ones. Both are improved by local search; the better one is returned.
    """
    enough = int(cost.sum()) // groups
    enough += enough >> _TOLERANCE
    group, load = _local_search(cost, *_greedy_lpt(cost, groups), enough)
    each, more = divmod(len(cost), groups)
    if load.max() > enough and each and more:
        other = _local_search(cost, *_lpt_by_count(cost, groups, each, more), enough)
        if other[1].max() < load.max():
            group = other[0]
    by_group = np.argsort(group, kind="stable")
    return np.split(by_group, np.cumsum(np.bincount(group, minlength=groups))[:-1])


def _local_search(cost: np.ndarray, group: np.ndarray, load: np.ndarray, enough: int) -> tuple[np.ndarray, np.ndarray]:
    """``group`` and ``load`` once no step makes the most expensive group cheaper, or it is cheap ``enough``: the best
    swap of one image for one of another group or for none; if no swap helps, the best split with another group."""
    for _ in range(_SEARCH_WORK // max(1, len(cost))):
        worst = int(load.argmax())
        if load[worst] <= enough:
            break
        found = _best_swap(cost, group, load, worst)
        if found is None:
            found = _best_split(cost, group, load, worst)
        if found is None:
            break
        images, targets = found
        np.subtract.at(load, group[images], cost[images])
        np.add.at(load, targets, cost[images])
        group[images] = targets
    return group, load


def _lpt_by_count(cost: np.ndarray, groups: int, each: int, more: int) -> tuple[np.ndarray, np.ndarray]:
    """(group of each image, load of each group): the cheapest (each + 1) * more images to ``more`` groups, the others
    to the rest, both parts by greedy LPT."""
    order = np.argsort(cost, kind="stable")
    cheap, expensive = np.split(order, [(each + 1) * more])
    group, load = np.empty(len(cost), np.int64), np.empty(groups, np.int64)
    group[cheap], load[:more] = _greedy_lpt(cost[cheap], more)
    group[expensive], load[more:] = _greedy_lpt(cost[expensive], groups - more)
    group[expensive] += more
    return group, load


def _greedy_lpt(cost: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(group of each image, load of each group): the most expensive image first, each to the cheapest group so far."""
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


Moves = tuple[np.ndarray, np.ndarray]  # images, and the group that each goes to


def _best_swap(cost: np.ndarray, group: np.ndarray, load: np.ndarray, worst: int) -> Moves | None:
    """One image of the group ``worst`` for one of another group, or for none; None if neither helps."""
    mine, most = np.flatnonzero(group == worst), load[worst]
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
    return np.array([mine[i], j]), np.array([group[j], worst])


def _best_split(cost: np.ndarray, group: np.ndarray, load: np.ndarray, worst: int) -> Moves | None:
    """All images of the group ``worst`` and of a cheap one, split between the two in the best of all ways; None if no
    split helps, or if the groups are too large to try all."""
    counts = np.bincount(group, minlength=len(load))
    width = int(counts.max())
    if counts[worst] + width > _SPLIT_LIMIT:
        return None
    slot = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((len(load), width), -1, np.int64)  # the images of each group
    by_group = np.argsort(group, kind="stable")
    table[group[by_group], slot] = by_group
    others = np.argsort(load, kind="stable")[:_PARTNERS]
    others = others[others != worst]
    if not len(others):
        return None
    mine = table[worst][table[worst] >= 0]
    pool = np.concatenate((np.broadcast_to(mine, (len(others), len(mine))), table[others]), 1)
    value = np.where(pool >= 0, cost[pool], 0).astype(np.float64)  # whole numbers below 2**53: sums are exact
    subsets = _subsets(pool.shape[1])
    kept = value @ subsets  # (others, 2 ** images)
    after = np.maximum(kept, value.sum(1, keepdims=True) - kept)
    row, subset = np.unravel_index(after.argmin(), after.shape)
    if after[row, subset] >= load[worst]:
        return None
    images = pool[row]
    targets = np.where(subsets[:, subset] > 0, worst, others[row])
    return images[images >= 0], targets[images >= 0]


@lru_cache(maxsize=_SPLIT_LIMIT)
def _subsets(n: int) -> np.ndarray:
    """All subsets of n things as columns of 0 and 1: float64 (n, 2**n)."""
    return (np.arange(1 << n)[None, :] >> np.arange(n)[:, None] & 1).astype(np.float64)
