"""Precision and recall against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitv2_scale.evaluate.precision_recall import precision_recall

rng = np.random.default_rng


def brute_force(made: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float]:
    """By the definition, one pair at a time."""

    def radius(x, i):
        return sorted(((x[i] - y) ** 2).sum() for j, y in enumerate(x) if j != i)[k - 1]

    def share(x, centres):
        radii = [radius(centres, i) for i in range(len(centres))]
        inside = [any(((y - c) ** 2).sum() <= r for c, r in zip(centres, radii, strict=True)) for y in x]
        return sum(inside) / len(x)

    return share(made, real), share(real, made)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 3), block=st.sampled_from([1, 7, 64]))
def test_precision_and_recall_are_those_of_brute_force(seed, k, block):
    made, real = rng(seed).normal(size=(23, 3)) + 100, 1.5 * rng(seed + 1).normal(size=(31, 3)) + 100.5
    assert precision_recall(made, real, k, block=block) == brute_force(made, real, k)


def test_precision_and_recall_know_what_is_missing():
    left, right = rng(0).normal(size=(200, 4)), rng(1).normal(size=(200, 4)) + 50
    both = np.concatenate((left, right))
    assert precision_recall(left, left) == (1.0, 1.0)
    assert precision_recall(left, right) == (0.0, 0.0)
    precision, recall = precision_recall(left + 1e-3, both)
    assert precision > 0.99 and recall == pytest.approx(0.5, abs=0.01)
