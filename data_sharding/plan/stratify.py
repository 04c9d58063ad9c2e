"""A window's images to its steps: equal counts, nearly equal token totals, and the same mixture in each.

The images come in *lanes*: ranges of the window that hold whole frames, except at their two ends. Each lane gives every
step the same number of images, and the totals are evened lane by lane. So any contiguous part of the window holds the
same fraction of every step's tokens: a node that takes one reads its own frames only, and has no more to do than the
others.

Within a lane, images are assigned by length strata (stratified sampling): sorted by tokens, each run of as many
neighbours as there are steps gives every step one of them. So a step never has more long or short images than a random
one would. Which of a stratum a step gets is decided by greedy LPT (longest processing time first) and improved by
swaps.
"""

import numpy as np

_LANE_IMAGES = 16  # of a lane in each step: with fewer, totals are less even; with more, nodes' parts are coarser
_SWAP_ROUNDS = 4


def order_frames(starts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Indices of the images in an order, frame by frame, of which any first part has nearly the mean length.

    Greedy, as in error diffusion: the next frame is one of those longer than the mean while the images so far are too
    short, else one of the shorter ones. Either kind keeps its order. ``starts`` are the frames' first images, from 0.
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


def assign_to_steps(tokens: np.ndarray, draws: np.ndarray, steps: int) -> np.ndarray:
    """Indices of each step's images, ascending: int64 (steps, images / steps).

    ``draws`` (uint64, random) order images of equal length. len(tokens) must be a multiple of ``steps``.
    """
    images = len(tokens) // steps
    lanes = max(1, images // _LANE_IMAGES)
    total, members = np.zeros(steps, np.int64), np.empty((steps, images), np.int64)
    for lane in range(lanes):
        first, last = lane * images // lanes, (lane + 1) * images // lanes
        here = slice(first * steps, last * steps)
        order = first * steps + np.lexsort((draws[here], -tokens[here]))
        _assign_lane(tokens, order.reshape(-1, steps), members[:, first:last], total)
        _swap_images(tokens, members[:, first:last], total)
    return np.sort(members, axis=1)


def _assign_lane(tokens: np.ndarray, strata: np.ndarray, members: np.ndarray, total: np.ndarray) -> None:
    """Fills ``members`` (steps, strata) and adds to ``total``. Greedy LPT: of each stratum, the longest image goes to
    the step with the fewest tokens so far; the stratum with the widest range of lengths first, so that narrower ones
    correct what it leaves uneven."""
    widths = tokens[strata[:, 0]] - tokens[strata[:, -1]]
    for column, stratum in enumerate(strata[np.argsort(-widths, kind="stable")]):
        fewest_first = np.argsort(total, kind="stable")
        members[fewest_first, column] = stratum
        total[fewest_first] += tokens[stratum]


def _swap_images(tokens: np.ndarray, members: np.ndarray, total: np.ndarray) -> None:
    """The step with the most tokens and the one with the fewest, the second of each, … swap the two images of this
    lane that make their totals most equal."""
    pairs = len(total) // 2
    for _ in range(_SWAP_ROUNDS):
        order = np.argsort(total, kind="stable")
        fewest, most = order[:pairs], order[::-1][:pairs]
        gap = total[most] - total[fewest]
        given = tokens[members[most]][:, :, None] - tokens[members[fewest]][:, None, :]
        left = np.abs(gap[:, None, None] - 2 * given).reshape(pairs, members.shape[1] ** 2)
        best = left.argmin(1)
        helps = np.flatnonzero(left[np.arange(pairs), best] < gap)
        if not len(helps):
            break
        fewest, most = fewest[helps], most[helps]
        i, j = np.divmod(best[helps], members.shape[1])
        moved = tokens[members[most, i]] - tokens[members[fewest, j]]
        members[most, i], members[fewest, j] = members[fewest, j], members[most, i]
        total[most] -= moved
        total[fewest] += moved
