"""How far a fit can be trusted: it is made again on losses that could as well have been measured.

Points of one run are correlated: what is drawn anew are blocks of neighbouring residuals (a circular block bootstrap of
the residuals of log L), within each run, so that every size and every stretch of training stays in the table. Where
several runs have one size, whole runs are drawn as well: how they differ is what another seed would do. Residuals are
widened, since a fit follows its own points, and since short blocks break up what is correlated beyond them.

The interval is that of the law, not of one noisy measurement; and it knows nothing of a law that does not hold.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.9
DRAWS = 200


@dataclass(frozen=True)
class Residuals:
    """Of one run, in the order of training: log(measured / fitted), (points,)."""

    size: Hashable
    values: np.ndarray


def redrawn(runs: Sequence[Residuals], parameters: int, draws: int) -> list[list[tuple[int, np.ndarray]]]:
    """For each draw, and each run's place in the table: which run stands there, and residuals to add to its fitted
    logarithms. Empty where no degree of freedom is left over."""
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
    """Each draw's parts end to end, as a row; rows that are shorter, as with runs of unlike lengths, are filled up."""
    rows = [np.concatenate(row) for row in parts]
    found = np.full((len(rows), max(map(len, rows))), fill)
    for row, values in zip(found, rows, strict=True):
        row[: len(values)] = values
    return found


def _widening(residuals: Sequence[np.ndarray], parameters: int) -> float:
    """sqrt(points / (points - parameters)), and what blocks lose of the variance of sums if the residuals follow an
    AR(1): its correlation is that of neighbours, all runs together, plus what a fit takes from it."""
    points = sum(len(r) for r in residuals)
    neighbours = sum(float(r[1:] @ r[:-1]) for r in residuals) / max(sum(float(r @ r) for r in residuals), 1e-300)
    rho = float(np.clip(neighbours + (parameters + len(residuals)) / points, 0.0, 0.9))
    length = _block_length(points // len(residuals))
    kept = 1 + 2 * sum((1 - k / length) * rho**k for k in range(1, length))
    return (points / (points - parameters) * (1 + rho) / (1 - rho) / kept) ** 0.5


def _block_length(points: int) -> int:
    return max(1, round(points ** (1 / 3)))


def _blocks(residuals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many, in blocks of about the cube root of their number."""
    n, length = len(residuals), _block_length(len(residuals))
    begins = rng.integers(0, n, -(-n // length))
    places = (begins[:, None] + np.arange(length)).reshape(-1)[:n] % n
    return residuals[places]


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """The middle ``level`` of them."""
    low, high = np.quantile(np.asarray(values, float), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
