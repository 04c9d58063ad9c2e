"""A step's images to ranks and packs: pure functions of (the step's images, ranks, shapes), the same on every rank.

Nothing here changes what a run learns. It decides how evenly the work is divided, and how much of a pack is padding.

Every rank does this for all ranks in each step, so it takes arrays of all ranks' images together, never a call a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_sharding.plan.groups import group_sums, members
from data_sharding.plan.pack_layout import PackShape
from data_sharding.plan.partition import partition_ranges

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
    """The pack of each image of a step. All ranks have as many packs, all of ``shape``, some empty."""

    shape: PackShape
    ranks: int
    count: int  # packs of each rank
    pack: np.ndarray  # int64 (B,): rank * count + index of the rank's pack

    @property
    def packs(self) -> list[list[np.ndarray]]:
        """``packs[rank][pack]`` = indices into the step, ascending."""
        found = members(self.pack, self.ranks * self.count)
        return [found[first : first + self.count] for first in range(0, len(found), self.count)]

    def packs_of(self, rank: int) -> list[np.ndarray]:
        """``packs[rank]``, without those of other ranks."""
        return [np.flatnonzero(self.pack == rank * self.count + k) for k in range(self.count)]

    def loads(self, cost: np.ndarray) -> np.ndarray:
        """The cost of each rank's images, of which ``cost`` is that of each: int64 (ranks,)."""
        return group_sums(cost, self.pack // self.count, self.ranks)


def assign_packs(tokens: np.ndarray, cost: Cost, nodes: Nodes, shapes: Sequence[PackShape]) -> PackAssignment:
    """Divides a step's images among ranks evenly in cost, and each rank's among packs evenly in tokens.

    ``tokens`` is int64 (B,), the length of each image. Packs are as few as the largest of ``shapes`` (ascending)
    allows, of the smallest shape that holds them all.
    """
    rank, ranks = partition_over_nodes(cost.of(tokens), nodes), sum(nodes)
    count = fewest_packs(tokens, rank, ranks, shapes[-1].tokens)
    while True:
        pack = split_into_packs(tokens, rank, ranks, count)
        images, sums = np.bincount(pack, minlength=ranks * count), group_sums(tokens, pack, ranks * count)
        for shape in shapes:
            if shape.holds(images, sums):
                return PackAssignment(shape, ranks, count, pack)
        count += 1


def fewest_packs(tokens: np.ndarray, rank: np.ndarray, ranks: int, most: int) -> int:
    """Packs of ``most`` tokens that the rank with the most tokens needs at least, where ``rank`` is that of each
    image."""
    return max(1, -(-int(group_sums(tokens, rank, ranks).max()) // most))


def split_into_packs(tokens: np.ndarray, rank: np.ndarray, ranks: int, count: int) -> np.ndarray:
    """The pack of each image, as in PackAssignment, when each rank has ``count``: int64 (B,)."""
    if count == 1:
        return rank
    by_rank, pack = np.argsort(rank, kind="stable"), np.empty_like(rank)
    ends = np.cumsum(np.bincount(rank, minlength=ranks))
    pack[by_rank] = rank[by_rank] * count + partition_ranges(tokens[by_rank], ends, np.full(ranks, count))
    return pack


def partition_over_nodes(cost: np.ndarray, nodes: Nodes) -> np.ndarray:
    """The rank of each image, int64 (B,), node by node.

    Each node gets a contiguous range of images, of the cost that its ranks are due to within one image. Neighbours lie
    in the same frames, in every step, so a node reads few frames that others read too.
    """
    ranks = np.array(nodes)
    before = np.concatenate(([0], np.cumsum(cost)))
    ends = _nearest(before * sum(nodes), np.cumsum(ranks) * before[-1])
    first_rank = np.repeat(np.cumsum(ranks) - ranks, np.diff(ends, prepend=0))
    return first_rank + partition_ranges(cost, ends, ranks)


def _nearest(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Index of the element nearest to each of ``values``, the first of several."""
    after = np.searchsorted(ascending, values)
    below, above = ascending[np.maximum(after - 1, 0)], ascending[np.minimum(after, len(ascending) - 1)]
    return np.searchsorted(ascending, np.where(values - below <= np.abs(above - values), below, above))
