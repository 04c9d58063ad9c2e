"""A run is a function of (config, seed, dataset): the number of processes changes nothing but the order of sums."""

import pytest
from lineage import losses, trained
from ranks import run_ranks

from fitv2_scale.train import train

STEPS = 50


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_run_on_any_number_of_ranks(tiny, size):
    one, many = tiny("one", train__steps=STEPS), tiny("many", train__steps=STEPS)
    assert run_ranks(1, train, one) == [0]
    assert run_ranks(size, train, many) == [0] * size
    assert trained(one.run) == trained(many.run)  # ids, bits of t, noise integers
    expected, found = losses(one.run), losses(many.run)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    for step in expected:
        assert found[step] == pytest.approx(expected[step], rel=1e-6), step
