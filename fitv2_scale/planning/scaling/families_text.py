"""The comparisons of families in a report, as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from fitv2_scale.planning.scaling.read_curves import AXES

_OF_LOSSES = (
    "Losses of different objectives measure different things: there is a table for each, and between them FIDs are "
    "compared."
)
_WIDTH = 28


def families_lines(comparisons: Sequence[dict[str, Any]], objectives: Mapping[str, str]) -> list[str]:
    """``objectives``: that of each run, by name."""
    lines = [_OF_LOSSES] if len(set(objectives.values())) > 1 else []
    for comparison in comparisons:
        lines.append(f"{comparison['metric']}: to {comparison['target']:.5g}, as ratios to {comparison['baseline']}")
        heads = ("steps", "images", "FLOPs", "GPU-hours")
        lines.append(f"  {'':{_WIDTH}}" + "".join(f"{head:>{_WIDTH}}" for head in heads))
        for row in comparison["rows"]:
            lines += _row(row)
        lines += [f"  {sentence}" for sentence in comparison["left_out"]]
    return lines


def _row(row: dict[str, Any]) -> list[str]:
    name = f"  {row['name']:{_WIDTH}}"
    if not row["reached"]:
        return [f"{name} not reached by step {row['last']:,.0f}"]
    at_most = "at most " * row["at_most"]
    cells = [_needed(axis, row["needed"][axis], at_most) for axis in AXES]
    lines = [name + "".join(f"{cell:>{_WIDTH}}" for cell in cells)]
    if any(row["ratios"].values()):
        ratios = [_ratio(row["ratios"][axis], at_most) for axis in AXES]
        lines.append(f"  {'  ratio':{_WIDTH}}" + "".join(f"{cell:>{_WIDTH}}" for cell in ratios))
    return [*lines, f"    {row['note']}"] if row["note"] else lines


def _needed(axis: str, value: float | None, at_most: str) -> str:
    if value is None:
        return "-"
    return at_most + (f"{value:,.0f}" if axis == "steps" else f"{value:.4g}")


def _ratio(ratio: dict[str, float | None] | None, at_most: str) -> str:
    if ratio is None:
        return "-"
    between = "" if ratio["low"] is None else f" ({ratio['low']:.4g} to {ratio['high']:.4g})"
    return f"{at_most}{ratio['value']:.4g}{between}"
