"""Multiway number partitioning: images of given costs into a given number of groups, so that the largest sum is small.

The method is greedy LPT (longest processing time first), then local search: swaps of two images between the most
expensive group and another one and, in small groups, the best of all two-way splits.
"""

import numpy as np

from data_sharding.plan.greedy_lpt import descending, greedy_lpt
from data_sharding.plan.groups import group_sums, members
from data_sharding.plan.local_search import local_search

_TOLERANCE = 10  # a largest sum within 2**-10 of the mean is good enough


def partition(cost: np.ndarray, groups: int) -> list[np.ndarray]:
    """Indices of the images of each of ``groups`` groups, such that the largest sum of costs is small; a group may be
    empty. ``cost`` is int64 (N,)."""
    return members(partition_ranges(cost, np.array([len(cost)]), np.array([groups])), groups)


def partition_ranges(cost: np.ndarray, ends: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The group of each image among the ``groups[k]`` of its range k: int64 (N,).

    ``cost`` is int64 (N,); range k ends before image ``ends[k]``, where the next one begins. Each range is partitioned
    as if it were alone; those with as many groups, together.
    """
    size = np.diff(ends, prepend=0)
    first = ends - size
    found = np.zeros(len(cost), np.int64)
    for count in np.unique(groups[groups > 1]).tolist():
        which = np.flatnonzero((groups == count) & (size > 0))
        if not len(which):
            continue
        at_N = np.arange(size[which].max())
        index_KN = np.minimum(first[which, None] + at_N, len(cost) - 1)
        there_KN = at_N < size[which, None]
        group_KN = _partition_rows(np.where(there_KN, cost[index_KN], 0), size[which], count)
        found[index_KN[there_KN]] = group_KN[there_KN]
    return found


def _partition_rows(cost_KN: np.ndarray, size_K: np.ndarray, groups: int) -> np.ndarray:
    """The group of each of a row's first ``size_K`` images: int64 (K, N).

    Starts from greedy LPT and, where the count of images does not divide, also from a partition in which the groups
    that must hold one image more get the cheapest ones. Both are improved by local search; the better one is taken.
    """
    enough_K = cost_KN.sum(1) // groups
    enough_K += enough_K >> _TOLERANCE
    group_KN = _lpt(cost_KN, size_K, np.full(len(size_K), groups))
    load_KG = _loads(cost_KN, group_KN, groups)
    local_search(cost_KN, size_K, group_KN, load_KG, enough_K)

    again = np.flatnonzero((load_KG.max(1) > enough_K) & (size_K >= groups) & (size_K % groups > 0))
    if len(again):
        other_RN = _lpt_by_count(cost_KN[again], size_K[again], groups)
        other_RG = _loads(cost_KN[again], other_RN, groups)
        local_search(cost_KN[again], size_K[again], other_RN, other_RG, enough_K[again])
        better = other_RG.max(1) < load_KG[again].max(1)
        group_KN[again[better]] = other_RN[better]
    return group_KN


def _lpt(cost_KN: np.ndarray, size_K: np.ndarray, groups_K: np.ndarray) -> np.ndarray:
    """``greedy_lpt`` of costs in any order, equal ones in theirs; group 0 beyond ``size_K``."""
    order_KN, group_KN = descending(cost_KN, size_K), np.zeros(cost_KN.shape, np.int64)
    found_KN = greedy_lpt(np.take_along_axis(cost_KN, order_KN, 1), size_K, groups_K)
    np.put_along_axis(group_KN, order_KN, found_KN, 1)
    return group_KN


def _lpt_by_count(cost_KN: np.ndarray, size_K: np.ndarray, groups: int) -> np.ndarray:
    """The cheapest (each + 1) * more images to the first ``more`` groups, the others to the rest, both parts by greedy
    LPT, where a row has each * groups + more images: int64 (K, N)."""
    each_K, more_K = np.divmod(size_K, groups)
    cheap_K, place_N = (each_K + 1) * more_K, np.arange(cost_KN.shape[1])
    cheapest_KN = descending(-cost_KN, size_K)
    others = np.minimum(cheap_K[:, None] + place_N, len(place_N) - 1)
    part_PN = np.concatenate((cheapest_KN, np.take_along_axis(cheapest_KN, others, 1)))
    size_P = np.concatenate((cheap_K, size_K - cheap_K))
    row_P = np.tile(np.arange(len(size_K)), 2)
    group_PN = _lpt(cost_KN[row_P[:, None], part_PN], size_P, np.concatenate((more_K, groups - more_K)))
    group_PN[len(size_K) :] += more_K[:, None]
    group_KN, there_PN = np.zeros(cost_KN.shape, np.int64), place_N < size_P[:, None]
    group_KN[np.broadcast_to(row_P[:, None], part_PN.shape)[there_PN], part_PN[there_PN]] = group_PN[there_PN]
    return group_KN


def _loads(cost_KN: np.ndarray, group_KN: np.ndarray, groups: int) -> np.ndarray:
    """The load of each group of each row, whose costs are 0 beyond its images: int64 (K, groups)."""
    group_KN = group_KN + groups * np.arange(len(cost_KN))[:, None]
    return group_sums(cost_KN.ravel(), group_KN.ravel(), groups * len(cost_KN)).reshape(-1, groups)
