"""A window's images to its steps: equal counts, nearly equal token totals, and the same mixture in each.

The images come in *lanes*, stretches of the window of whole frames (but for the two at its ends). Each lane gives every
step as many images, and the totals are evened lane after lane. So any contiguous share of the window holds the same
share of every step's tokens: a node that takes one reads its own frames only, and has no more to do than the others.

Within a lane images are dealt by length strata: sorted by tokens, every run of as many neighbours as there are steps
gives each step one of them. A step is therefore never richer in long or short images than chance would make it.
"""

import numpy as np

_LANE_IMAGES = 16  # of a lane in each step: fewer even out worse, more leave coarser shares for nodes
_EXCHANGES = 4  # rounds


def order_frames(starts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """An order of images, frame by frame, in which any first part has nearly the mean length.

    ``starts`` are the frames' first images, from 0. Frames keep their order among those that are longer than the mean,
    and among those that are not; from which of the two the next one comes is decided by the tokens so far.
    """
    counts = np.diff(starts, append=len(tokens))
    # tokens above the mean, times the number of images: whole numbers
    excess = np.add.reduceat(tokens, starts) * len(tokens) - counts * tokens.sum()
    longer, shorter = ([f.item() for f in np.flatnonzero(which)[::-1]] for which in (excess > 0, excess <= 0))
    order, sum_so_far = [], 0
    while longer or shorter:
        source = shorter if shorter and (sum_so_far > 0 or not longer) else longer
        order.append(source.pop())
        sum_so_far += int(excess[order[-1]])
    counts, begins = counts[order], starts[order]
    return np.repeat(begins - np.cumsum(counts) + counts, counts) + np.arange(len(tokens))


def deal_to_steps(tokens: np.ndarray, keyed: np.ndarray, steps: int) -> np.ndarray:
    """Indices of each step's images, ascending: int64 (steps, images / steps).

    ``keyed`` (uint64) orders images of equal length. len(tokens) must be a multiple of ``steps``.
    """
    images = len(tokens) // steps
    lanes = max(1, images // _LANE_IMAGES)
    total, members = np.zeros(steps, np.int64), np.empty((steps, images), np.int64)
    for lane in range(lanes):
        first, last = lane * images // lanes, (lane + 1) * images // lanes
        here = slice(first * steps, last * steps)
        order = first * steps + np.lexsort((keyed[here], -tokens[here]))
        _deal_lane(tokens, order.reshape(-1, steps), members[:, first:last], total)
        _exchange(tokens, members[:, first:last], total)
    return np.sort(members, axis=1)


def _deal_lane(tokens: np.ndarray, strata: np.ndarray, members: np.ndarray, total: np.ndarray) -> None:
    """Fills ``members`` (steps, strata) and adds to ``total``: the longest of a stratum to the step with the fewest
    tokens so far, the widest stratum first, so that narrower ones correct what it leaves uneven."""
    widths = tokens[strata[:, 0]] - tokens[strata[:, -1]]
    for column, stratum in enumerate(strata[np.argsort(-widths, kind="stable")]):
        poorest_first = np.argsort(total, kind="stable")
        members[poorest_first, column] = stratum
        total[poorest_first] += tokens[stratum]


def _exchange(tokens: np.ndarray, members: np.ndarray, total: np.ndarray) -> None:
    """The richest step and the poorest, the second richest and the second poorest, … exchange the two images of this
    lane that make their totals most equal."""
    pairs = len(total) // 2
    for _ in range(_EXCHANGES):
        order = np.argsort(total, kind="stable")
        poor, rich = order[:pairs], order[::-1][:pairs]
        gap = total[rich] - total[poor]
        given = tokens[members[rich]][:, :, None] - tokens[members[poor]][:, None, :]
        left = np.abs(gap[:, None, None] - 2 * given).reshape(pairs, members.shape[1] ** 2)
        best = left.argmin(1)
        helps = np.flatnonzero(left[np.arange(pairs), best] < gap)
        if not len(helps):
            break
        poor, rich = poor[helps], rich[helps]
        i, j = np.divmod(best[helps], members.shape[1])
        moved = tokens[members[rich, i]] - tokens[members[poor, j]]
        members[rich, i], members[poor, j] = members[poor, j], members[rich, i]
        total[rich] -= moved
        total[poor] += moved
