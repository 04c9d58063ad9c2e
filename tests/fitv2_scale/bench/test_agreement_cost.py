"""The agreement's cost: counted in closed form, and measured between real processes."""

import math

from fitv2_scale.bench.agreement_cost import measure, messages_in_turn


def test_messages_in_turn():
    """log2 R, and two more where R is no power of two."""
    for ranks in (2, 3, 8, 64, 500, 512, 1000, 1024):
        ours = int(math.log2(ranks)) + 2 * (not math.log2(ranks).is_integer())
        assert messages_in_turn(ranks) == {"ours": ours, "gloo": 2 * ranks - 2}


def test_both_sums_are_measured_in_turn():
    found = measure(3, rounds=2, repeats=2)
    assert {kind: len(seconds) for kind, seconds in found.items()} == {"ours": 2, "gloo": 2}
    assert min(map(min, found.values())) > 0
