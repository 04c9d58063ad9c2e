"""Tests whether balancing steps by length biases training: one-sided tests of the contents of steps, and of trends.

With random steps each statistic would be about 1 (dispersions) or a standard normal variable (trends). Balancing may
make a step *more* like the whole dataset than chance, never less. ``sorted`` is the control, which the tests must
detect: the same images in steps of neighbours by length, and by class.
"""

from typing import Any

import numpy as np
from scipy import stats

from data_sharding.plan.plan import Plan

_LEVEL = 1e-3  # of each one-sided test


def bias(plan: Plan, url: str, steps: int) -> dict[str, Any]:
    """Statistics of the first ``steps`` steps, their bounds at level 0.001, and those of the sorted control."""
    images, classes = [plan.step(k) for k in range(steps)], len(plan.manifests[0].classes)
    tokens, label = (np.stack([getattr(s, column) for s in images]) for column in ("tokens", "label"))
    freedom = (steps - 1) * (classes - 1)
    bounds = {
        "length_dispersion": stats.chi2.isf(_LEVEL, steps - 1) / (steps - 1),
        "class_dispersion": stats.chi2.isf(_LEVEL, freedom) / freedom,
        "length_trend": stats.norm.isf(_LEVEL / 2),
        "class_trend": stats.norm.isf(_LEVEL / 2 / classes),  # for the largest of all classes
    }
    found = _statistics(tokens, label, classes)
    control = _statistics(
        np.sort(tokens, None).reshape(tokens.shape), np.sort(label, None).reshape(label.shape), classes
    )
    tests = {
        name: {"statistic": found[name], "bound": float(bound), "sorted": control[name]}
        for name, bound in bounds.items()
    }
    return {"data": url, "steps": steps, "tests": tests}


def _statistics(tokens: np.ndarray, label: np.ndarray, classes: int) -> dict[str, float]:
    """``tokens`` and ``label`` are (steps, images)."""
    steps, images = tokens.shape
    means = tokens.mean(1)
    counts = np.stack([np.bincount(row, minlength=classes) for row in label])
    expected = counts.mean(0)
    return {
        "length_dispersion": float(means.var(ddof=1) * images / tokens.var()),
        "class_dispersion": float(((counts - expected) ** 2 / expected).sum() / ((steps - 1) * (classes - 1))),
        "length_trend": float(_trend(means[:, None], tokens.var() / images)[0]),
        "class_trend": float(_trend(counts, expected).max()),
    }


def _trend(values: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """|covariance| of each column with the row's index, in standard deviations under chance, if the entries of a row
    have ``variance``."""
    index = np.arange(len(values)) - (len(values) - 1) / 2
    return np.abs(index @ (values - values.mean(0))) / np.sqrt((index @ index) * variance)
