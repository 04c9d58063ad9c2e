"""Measures what must not grow faster than the number of ranks, without the ranks: `fitv2 bench scale`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from fitv2_scale.bench.agreement_cost import measure_agreement
from fitv2_scale.bench.scale_dealing import measure_dealing
from fitv2_scale.bench.scale_saving import measure_saving

RANKS = (8, 64, 512, 1024)


@dataclass(frozen=True)
class Measurement:
    """A row of the table: one figure by the number of ranks."""

    name: str
    unit: str
    by_ranks: dict[int, float]

    @property
    def growth(self) -> list[float | None]:
        """The figure of each number of ranks over that of the one before; None if that was 0."""
        return [after / before if before else None for before, after in pairwise(self.by_ranks.values())]


# Each gives, for a number of ranks, the value of its rows: {(name, unit): value}.
PARTS: tuple[Callable[[int], dict[tuple[str, str], float]], ...] = (
    measure_dealing,
    measure_agreement,
    measure_saving,
)


def measure(ranks: Sequence[int] = RANKS) -> list[Measurement]:
    """The rows of all parts, for each of ``ranks``."""
    return [row for part in PARTS for row in _rows({number: part(number) for number in sorted(set(ranks))})]


def _rows(found: dict[int, dict[tuple[str, str], float]]) -> Iterator[Measurement]:
    for name, unit in next(iter(found.values())):
        yield Measurement(name, unit, {number: values[name, unit] for number, values in found.items()})


def to_json(rows: Sequence[Measurement]) -> dict[str, Any]:
    """As JSON: {"measurements": [{"name": …, "unit": …, "by_ranks": {"8": …}, "growth": […]}]}."""
    return {"measurements": [asdict(row) | {"growth": row.growth} for row in rows]}


def to_text(rows: Sequence[Measurement]) -> str:
    """The table, with the growth from each number of ranks to the next in brackets."""
    lines = [f"{'ranks':<44}" + "".join(f"{number:>20,}" for number in rows[0].by_ranks)]
    for row in rows:
        growth = ["", *("" if factor is None else f" ({factor:.1f}x)" for factor in row.growth)]
        cells = [f"{value:.3g}{by}" for value, by in zip(row.by_ranks.values(), growth, strict=True)]
        lines.append(f"{f'{row.name}, {row.unit}':<44}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)
