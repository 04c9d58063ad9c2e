"""Local search for partitions: makes the most expensive group of each row cheaper, a step at a time, while one helps.

A step is the best swap of one of its images for one of another group, or for none; if no swap helps, the best of all
two-way splits with another group, in small groups. Many rows take their steps together; the last few, and long ones,
take them one by one (``heap_search``).
"""

from functools import lru_cache

import numpy as np

from data_sharding.plan.heap_search import HeapSearch

_WORK = 1 << 21  # steps of a row times its images: bounds the time that a row takes
_PARTNERS = 64  # groups, the cheapest, that are tried in two-way splits with the most expensive one
_SPLIT_LIMIT = 10  # images in two groups up to which all their splits are tried: 2**10 sums
_FEW = 4  # rows, for which steps one by one are faster
_LONG = 512  # images of a row, from which on they are
_BLOCK = 1 << 15  # loads after a swap that are compared at once: they should stay in the processor's cache
_FAR = 1 << 61  # more than any load, and twice as much fits 63 bits


def local_search(
    cost_KN: np.ndarray, size_K: np.ndarray, group_KN: np.ndarray, load_KG: np.ndarray, enough_K: np.ndarray
) -> None:
    """Changes ``group_KN`` and ``load_KG`` until no step helps a row, or its largest load is at most ``enough_K``.

    Row k has ``size_K[k]`` images, the first of its ``N``; every array is int64.
    """
    left_K = _WORK // np.maximum(size_K, 1)
    rows = np.flatnonzero(load_KG.max(1) > enough_K)
    while len(rows) > _FEW and cost_KN.shape[1] <= _LONG:
        helped = _swap_together(cost_KN, size_K, group_KN, load_KG, rows)
        for k in rows[~helped].tolist():
            size = size_K[k]
            split = _best_split(cost_KN[k, :size], group_KN[k, :size], load_KG[k])
            if split is not None:
                _reassign(cost_KN[k], group_KN[k], load_KG[k], *split)
                helped[rows == k] = True
        left_K[rows] -= 1
        rows = rows[helped & (left_K[rows] > 0)]
        rows = rows[load_KG[rows].max(1) > enough_K[rows]]
    for k in rows.tolist():
        size = size_K[k]
        _search_row(cost_KN[k, :size], group_KN[k, :size], load_KG[k], int(enough_K[k]), int(left_K[k]))


def _search_row(cost_N: np.ndarray, group_N: np.ndarray, load_G: np.ndarray, enough: int, steps: int) -> None:
    search = HeapSearch(cost_N, group_N, load_G)
    for _ in range(steps):
        if load_G.max() <= enough:
            break
        if not search.improve():
            split = _best_split(cost_N, group_N, load_G)
            if split is None:
                break
            search.reassign(split[0].tolist(), split[1].tolist())


def _swap_together(
    cost_KN: np.ndarray, size_K: np.ndarray, group_KN: np.ndarray, load_KG: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Takes the best swap or move in each of ``rows``; whether there was one: bool (rows,)."""
    cost_RN, group_RN, load_RG = cost_KN[rows], group_KN[rows], load_KG[rows]
    each, width = np.arange(len(rows)), cost_KN.shape[1]
    worst_R, lightest_R = load_RG.argmax(1), load_RG.argmin(1)
    most_R = load_RG[each, worst_R]
    there_RN = np.arange(width) < size_K[rows][:, None]
    own_RN = (group_RN == worst_R[:, None]) & there_RN
    other_RN = np.take_along_axis(load_RG, group_RN, 1) - cost_RN  # load of an image's group without it
    other_RN[own_RN | ~there_RN] = _FAR

    row_P, image_P = np.nonzero(own_RN)  # the images of the most expensive groups
    cost_P, rest_P = cost_RN[row_P, image_P], most_R[row_P] - cost_RN[row_P, image_P]
    after_P, partner_P = np.empty_like(row_P), np.empty_like(row_P)
    for start in range(0, len(row_P), block := max(1, _BLOCK // width)):
        part = slice(start, start + block)
        after_BN = cost_RN[row_P[part]] + rest_P[part, None]
        np.maximum(after_BN, other_RN[row_P[part]] + cost_P[part, None], out=after_BN)
        partner_P[part], after_P[part] = after_BN.argmin(1), after_BN.min(1)
    moved_P = np.maximum(rest_P, load_RG[each, lightest_R][row_P] + cost_P)
    swap_R = _first_least(after_P, row_P)
    move_R = _first_least(moved_P, row_P)
    swapped_R, moves_R = after_P[swap_R], moved_P[move_R]

    helps = np.minimum(swapped_R, moves_R) < most_R
    swaps = np.flatnonzero(helps & (swapped_R <= moves_R))
    moves = np.flatnonzero(helps & (swapped_R > moves_R))
    image_R, partner_R = image_P[np.where(swapped_R <= moves_R, swap_R, move_R)], partner_P[swap_R]
    target_R = lightest_R.copy()
    target_R[swaps] = group_RN[swaps, partner_R[swaps]]
    gained_R = cost_RN[each, image_R]
    gained_R[swaps] -= cost_RN[swaps, partner_R[swaps]]
    group_KN[rows[swaps], partner_R[swaps]] = worst_R[swaps]
    either = np.concatenate((swaps, moves))
    group_KN[rows[either], image_R[either]] = target_R[either]
    load_KG[rows[either], worst_R[either]] -= gained_R[either]
    load_KG[rows[either], target_R[either]] += gained_R[either]
    return helps


def _first_least(value_P: np.ndarray, row_P: np.ndarray) -> np.ndarray:
    """Index into P of the first of the least values of each row; ``row_P`` ascends, and each row is there."""
    starts = np.flatnonzero(np.diff(row_P, prepend=-1))
    least_R = np.minimum.reduceat(value_P, starts)
    found = np.flatnonzero(value_P == least_R[row_P])
    return found[np.flatnonzero(np.diff(row_P[found], prepend=-1))]


def _reassign(
    cost_N: np.ndarray, group_N: np.ndarray, load_G: np.ndarray, images: np.ndarray, targets: np.ndarray
) -> None:
    np.subtract.at(load_G, group_N[images], cost_N[images])
    np.add.at(load_G, targets, cost_N[images])
    group_N[images] = targets


Moves = tuple[np.ndarray, np.ndarray]  # images, and the group that each goes to


def _best_split(cost: np.ndarray, group: np.ndarray, load: np.ndarray) -> Moves | None:
    """All images of the most expensive group and of a cheap one, split between the two in the best of all ways; None if
    no split helps, or if the groups are too large to try all."""
    worst, counts = int(load.argmax()), np.bincount(group, minlength=len(load))
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
    kept = value @ subsets  # (others, subsets)
    after = np.maximum(kept, value.sum(1, keepdims=True) - kept)
    row, subset = np.unravel_index(after.argmin(), after.shape)
    if after[row, subset] >= load[worst]:
        return None
    images = pool[row]
    targets = np.where(subsets[:, subset] > 0, worst, others[row])
    return images[images >= 0], targets[images >= 0]


@lru_cache(maxsize=_SPLIT_LIMIT)
def _subsets(n: int) -> np.ndarray:
    """All subsets of n things without the last one, as columns of 0 and 1: float64 (n, 2 ** (n - 1)). With it they are
    the other halves of the same splits."""
    return (np.arange(1 << n - 1)[None, :] >> np.arange(n)[:, None] & 1).astype(np.float64)
