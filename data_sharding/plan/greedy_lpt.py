"""Greedy LPT (longest processing time first): the most expensive image first, each to the cheapest group so far.

Written for many ranges of images at once, a row each. A round gives every group of a row at most one image: in the
order of their loads, for as long as no group that the round has filled is cheaper than the next one. After the first
rounds groups differ by less than an image, so a round takes an image for nearly every group. Rows for which rounds are
no use are finished with a heap, an image at a time.
"""

from heapq import heapify, heapreplace

import numpy as np

_WORTH_ROUNDS = 256  # groups of all rows together, with fewer of which a heap is faster
_NEVER = np.iinfo(np.int64).max


def descending(cost_KN: np.ndarray, size_K: np.ndarray) -> np.ndarray:
    """Positions of each row's first ``size_K`` images by descending cost, equal ones in their order; then the others.

    int64 (K, N). A cost times N must fit 63 bits."""
    bits, position_N = cost_KN.shape[1].bit_length(), np.arange(cost_KN.shape[1])
    key_KN = (cost_KN.max(initial=0) - cost_KN << bits) | position_N
    key_KN[position_N >= size_K[:, None]] = _NEVER
    key_KN.sort(axis=1)
    order_KN = key_KN & ((1 << bits) - 1)
    order_KN[position_N >= size_K[:, None]] = cost_KN.shape[1] - 1
    return order_KN


def greedy_lpt(cost_KN: np.ndarray, size_K: np.ndarray, groups_K: np.ndarray) -> np.ndarray:
    """The group of each of a row's first ``size_K`` costs, which descend, in ``groups_K`` groups: int64 (K, N).

    A sum of costs times the groups must fit 63 bits."""
    rows, width = len(cost_KN), int(groups_K.max(initial=1))
    bits, number_G = width.bit_length(), np.arange(width)
    cost_KN = cost_KN << bits
    # A group's load, then its number, in one integer: the cheapest group, and of equal ones the first, is the smallest.
    key_KG = np.where(number_G < groups_K[:, None], number_G, _NEVER)
    group_KN, done_K = np.zeros(cost_KN.shape, np.int64), np.zeros(rows, np.int64)
    rounds = 2 * -(-cost_KN.shape[1] // width) if rows * width >= _WORTH_ROUNDS else 0
    for _ in range(rounds):
        if (done_K == size_K).all():
            break
        key_KG.sort(axis=1)
        at_KG = done_K[:, None] + number_G
        filled_KG = key_KG + np.take_along_axis(cost_KN, np.minimum(at_KG, cost_KN.shape[1] - 1), 1)
        takes_KG = at_KG < size_K[:, None]
        cheapest_KG = np.minimum.accumulate(np.where(takes_KG, filled_KG, _NEVER), axis=1)
        takes_KG[:, 1:] &= key_KG[:, 1:] < cheapest_KG[:, :-1]
        row, column = np.nonzero(takes_KG)
        group_KN[row, at_KG[row, column]] = key_KG[row, column] & ((1 << bits) - 1)
        key_KG[row, column] = filled_KG[row, column]
        done_K += takes_KG.sum(1)
    for row in np.flatnonzero(done_K < size_K).tolist():
        rest = slice(int(done_K[row]), int(size_K[row]))
        group_KN[row, rest] = _one_by_one(key_KG[row].tolist(), cost_KN[row, rest].tolist(), (1 << bits) - 1)
    return group_KN


def _one_by_one(keys: list[int], costs: list[int], mask: int) -> list[int]:
    """The group of each image, with a heap of ``greedy_lpt``'s keys."""
    heapify(keys)
    groups = []
    for cost in costs:
        key = keys[0]
        groups.append(key & mask)
        heapreplace(keys, key + cost)
    return groups
