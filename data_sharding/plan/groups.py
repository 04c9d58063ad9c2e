"""Images in groups: the images of each, and sums over them."""

import numpy as np


def members(group: np.ndarray, groups: int) -> list[np.ndarray]:
    """Indices of the images of each of ``groups`` groups, ascending. ``group`` is that of each image."""
    by_group, ends = np.argsort(group, kind="stable"), np.cumsum(np.bincount(group, minlength=groups)).tolist()
    return [by_group[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def group_sums(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """The sum of the values (int64) of each of ``groups`` groups: int64 (groups,)."""
    sums = np.zeros(groups, np.int64)
    np.add.at(sums, group, values)
    return sums
