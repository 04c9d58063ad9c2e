"""The static shapes of a run's packs: chosen from its plan, so that compiled kernels see at most three in a segment."""

from collections.abc import Sequence

import numpy as np

from data_sharding.errors import UserError
from data_sharding.plan.balance import Cost, Nodes, fewest_packs, partition_over_nodes, split_into_packs
from data_sharding.plan.groups import group_sums
from data_sharding.plan.pack_layout import PackShape
from data_sharding.plan.plan import Plan

ROUND = 8  # capacities are multiples of this
_HEADROOM = 64  # the largest capacity is at least 1/64 more than the examined steps need
_WINDOWS = 4  # examined: steps of one window are alike, windows differ in their mean length
_STEPS = 16  # of each


def shapes_for_plan(
    plan: Plan, cost: Cost, nodes: Nodes, max_tokens: int, step: int = 0, multiple_of: int = ROUND
) -> dict[int, tuple[PackShape, ...]]:
    """The shapes of the packs, ascending, by segment: of the first one, and of all that a run needs from ``step`` on.

    They depend on the segment's first windows, never on the step where an attempt begins nor on later segments: on the
    same ranks a step has the same shapes after every resume, and so the same bits. Raises as ``choose_shapes``.
    """
    segments = {0, *range(plan.segment_at(step), len(plan.schedule))}
    return {
        segment: choose_shapes(_first_steps(plan, segment), cost, nodes, max_tokens, plan.max_seqlen, multiple_of)
        for segment in sorted(segments)
    }


def _first_steps(plan: Plan, segment: int) -> list[np.ndarray]:
    """Token lengths of some steps of a segment's first windows, as if no other segment followed it."""
    if segment < len(plan.schedule) - 1:
        plan = plan.under(plan.schedule[: segment + 1])
    length = plan.window_steps(segment)
    start, stride = plan.schedule[segment].start, max(1, length // _STEPS)
    found = [
        plan.step(k).tokens for k in range(start, start + length, stride)
    ]  # their window stays in the plan's cache
    for window in range(1, _WINDOWS):
        found += list(plan.lengths(segment, window)[::stride])
    return found


def choose_shapes(
    steps: Sequence[np.ndarray], cost: Cost, nodes: Nodes, max_tokens: int, max_seqlen: int, multiple_of: int = ROUND
) -> tuple[PackShape, ...]:
    """Up to three static shapes, ascending, for steps like ``steps`` (int64 token lengths of each).

    Capacities are multiples of ``multiple_of``, packs as few as ``max_tokens`` allows. Each step uses the smallest
    shape that holds it. Two capacities are those with the least padding over these steps; the third has headroom for
    steps that were not examined. A step that fits none takes one pack more.

    Raises:
        UserError: more ranks than images in a step, or images longer than ``max_tokens``.
    """
    ranks = sum(nodes)
    if ranks > len(steps[0]):
        raise UserError(
            f"{ranks} data-parallel ranks are more than the {len(steps[0])} images of a step: raise batch.images or "
            f"start at most {len(steps[0])} processes"
        )
    largest = max_tokens // multiple_of * multiple_of
    if max_seqlen > largest:
        raise UserError(
            f"layout.max_tokens is {max_tokens}, less than one image of {max_seqlen} tokens rounded up to a multiple "
            f"of {multiple_of}: raise it"
        )
    by_rank = [(tokens, partition_over_nodes(cost.of(tokens), nodes)) for tokens in steps]
    count = max(fewest_packs(tokens, rank, ranks, largest) for tokens, rank in by_rank)
    while True:
        packs = [(tokens, split_into_packs(tokens, rank, ranks, count)) for tokens, rank in by_rank]
        images_SP = np.array([np.bincount(pack, minlength=ranks * count) for _, pack in packs])
        tokens_SP = np.array([group_sums(tokens, pack, ranks * count) for tokens, pack in packs])
        needs = tokens_SP.max(1)
        if needs.max() <= largest:
            break
        count += 1
    capacities = _capacities(needs, max_seqlen, multiple_of)
    headroom = max(capacities[-1] // _HEADROOM, 2 * int(needs.max() - np.median(needs)))
    spacious = min(largest, _round_up(capacities[-1] + headroom, multiple_of))
    return tuple(
        PackShape(capacity, _slots(images_SP, tokens_SP, capacity, max_seqlen), max_seqlen)
        for capacity in sorted({*capacities, spacious})
    )


def _slots(images_SP: np.ndarray, tokens_SP: np.ndarray, capacity: int, max_seqlen: int) -> int:
    """Image slots that packs of ``capacity`` tokens need, padding included; at least those of a nearly empty one."""
    shape = PackShape(capacity, 0, max_seqlen)
    fits = tokens_SP <= capacity
    most = int((images_SP + shape.padding_slots(capacity - tokens_SP))[fits].max())
    return max(most + most // 8, shape.padding_slots(capacity)) + 1  # an eighth more, for steps that were not examined


def _capacities(needs: np.ndarray, least: int, multiple_of: int) -> list[int]:
    """At most two capacities, ascending, of which the last holds every need: the pair with the least sum, over the
    needs, of the smaller capacity that holds each."""
    rounded = [_round_up(max(int(need), least), multiple_of) for need in needs]
    candidates, counts = np.unique(rounded, return_counts=True)
    held, last = np.cumsum(counts), len(candidates) - 1
    total = candidates[:last] * held[:last] + candidates[last] * (len(needs) - held[:last])
    if last == 0:
        return [int(candidates[0])]
    return [int(candidates[total.argmin()]), int(candidates[last])]


def _round_up(tokens: int, multiple_of: int) -> int:
    return -(-tokens // multiple_of) * multiple_of
