"""Confidence intervals of a fit by the bootstrap: the fit is repeated on losses that could have been measured as well.

The points of one run are correlated, so blocks of neighbouring residuals are resampled (a circular block bootstrap of
the residuals of log L), within each run: every size and every part of training stays in the table. Where several runs
have the same size, whole runs are resampled too, which shows the effect of another seed. Residuals are widened, because
a fit follows its own points and because short blocks lose correlations over longer distances.

The interval is that of the law, not of one noisy measurement, and it assumes that the law holds.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.9
DRAWS = 200


@dataclass(frozen=True)
class Residuals:
    """The residuals of one run in the order of training: log(measured / fitted), (points,)."""

    size: Hashable
    values: np.ndarray


def resample(runs: Sequence[Residuals], parameters: int, draws: int) -> list[list[tuple[int, np.ndarray]]]:
    """For each draw and each position in the table: the index of the run that takes this position, and residuals to add
    to its fitted logarithms. Empty where no degree of freedom is left."""
    points = sum(len(run.values) for run in runs)
    if points <= parameters:
        return []
    widened = _widening([run.values for run in runs], parameters)
    rng = np.random.default_rng(0)
    alike = {run.size: [i for i, other in enumerate(runs) if other.size == run.size] for run in runs}
    found = []
    for _ in range(draws):
        chosen = [int(rng.choice(alike[run.size])) for run in runs]
        found.append([(i, widened * _blocks(runs[i].values, rng)) for i in chosen])
    return found


def as_rows(parts: Sequence[Sequence[np.ndarray]], fill: float) -> np.ndarray:
    """The parts of each draw, concatenated to a row. Shorter rows (runs differ in length) are padded with ``fill``."""
    rows = [np.concatenate(row) for row in parts]
    found = np.full((len(rows), max(map(len, rows))), fill)
    for row, values in zip(found, rows, strict=True):
        row[: len(values)] = values
    return found


def _widening(residuals: Sequence[np.ndarray], parameters: int) -> float:
    """The factor for residuals: sqrt(points / (points - parameters)), and a correction for the variance of sums that
    blocks lose if the residuals follow an AR(1). Its correlation is that of neighbours, over all runs, plus the part
    that a fit removes."""
    points = sum(len(r) for r in residuals)
    neighbours = sum(float(r[1:] @ r[:-1]) for r in residuals) / max(sum(float(r @ r) for r in residuals), 1e-300)
    rho = float(np.clip(neighbours + (parameters + len(residuals)) / points, 0.0, 0.9))
    length = _block_length(points // len(residuals))
    kept = 1 + 2 * sum((1 - k / length) * rho**k for k in range(1, length))
    return (points / (points - parameters) * (1 + rho) / (1 - rho) / kept) ** 0.5


def _block_length(points: int) -> int:
    return max(1, round(points ** (1 / 3)))


def _blocks(residuals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many residuals, resampled in blocks whose length is about the cube root of their number."""
    n, length = len(residuals), _block_length(len(residuals))
    begins = rng.integers(0, n, -(-n // length))
    places = (begins[:, None] + np.arange(length)).reshape(-1)[:n] % n
    return residuals[places]


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """The bounds of the middle ``level`` of the values."""
    low, high = np.quantile(np.asarray(values, float), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
