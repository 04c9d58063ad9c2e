"""All that `fitv2 curves` says, as plain data and as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.errors import UserError
from fitv2_scale.planning.scaling.laws import (
    RunLaw,
    SurfaceLaw,
    law_of_points,
    law_of_run,
    law_of_sizes,
    with_intervals,
)
from fitv2_scale.planning.scaling.predictions import Kept, Question, predict, score
from fitv2_scale.planning.scaling.published_fid import FidCurve, beside, of_run, published
from fitv2_scale.planning.scaling.read_curves import AXES, Curve, common_loss, thinned

TARGET = 26.08  # FID of FiT-B/2 at its last point, 1,500K steps
_FRONTIER = 6  # rows
_FITTED = 4  # points of a published curve, for a law with one degree of freedom left over
_SHOWN = 5  # FIDs of a run


@dataclass(frozen=True)
class Asked:
    """What `fitv2 curves` was asked for."""

    folder: Path
    published: bool = False
    target: float = TARGET
    predict: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curves:
    """What was found, for report and pictures."""

    metric: str | None
    laws: list[tuple[Curve, RunLaw]]
    surface: SurfaceLaw | None
    why_no_surface: str | None
    fids: list[FidCurve]


def look_at(curves: Sequence[Curve], asked: Asked) -> Curves:
    """Raises UserError if there is nothing to look at."""
    if not curves and not asked.published:
        raise UserError("give runs, --experiment NAME, or --published for the paper's points alone")
    metric = common_loss(curves) if curves else None
    laws = [(curve, law_of_run(curve, metric)) for curve in curves]
    surface = why = None
    if curves:
        try:
            surface = law_of_sizes(curves, metric)
        except UserError as error:
            why = str(error)
    fids = [fid for curve in curves for fid in of_run(curve)] + (published() if asked.published else [])
    return Curves(metric, laws, surface, why, fids)


def as_plain(found: Curves, asked: Asked) -> dict[str, Any]:
    """Also makes and keeps the predictions asked for, and scores those kept before. Raises UserError."""
    kept, curves = Kept(asked.folder), [curve for curve, _ in found.laws]
    before = [score(prediction, curves) for prediction in kept.all()]
    questions = [Question.parse(text) for text in asked.predict]
    made = [predict(question, found.metric, found.surface, found.laws) for question in questions]
    for prediction in made:
        kept.add(prediction)
    return {
        "metric": found.metric,
        "runs": [_run(curve, law, found.metric) for curve, law in found.laws],
        "surface": _surface(found.surface) if found.surface else None,
        "why_no_surface": found.why_no_surface,
        "fid": _fid(found.fids, asked.target) if found.fids else None,
        "predictions": [score(prediction, curves) for prediction in made],
        "scored": before,
    }


def _run(curve: Curve, law: RunLaw, metric: str) -> dict[str, Any]:
    series = curve.series[metric]
    last = series.steps[-1:]
    reached = {axis: curve.along(axis, last) for axis in AXES}
    return {
        "name": curve.name,
        "parameters": curve.parameters,
        "batch": curve.batch,
        **{axis: None if at is None else float(at[0]) for axis, at in reached.items()},
        "value": float(series.values[-max(1, len(series.values) // 50) :].mean()),
        "points": len(law.points.steps),
        "fit": with_intervals(law.fit, law.redrawn) if law.fit else None,
        "why": law.why,
    }


def _surface(law: SurfaceLaw) -> dict[str, Any]:
    flops = 10.0 ** np.arange(17, 17 + _FRONTIER)
    n, images = law.best(flops)
    rows = zip(flops, n, images, law.fit(n, images), strict=True)
    return {
        "fit": with_intervals(law.fit, law.redrawn),
        "why_no_interval": law.why_no_interval,
        "flops_an_image": {"factor": law.per_image, "exponent": law.grows},
        "frontier": [
            {"flops": float(c), "parameters": float(a), "images": float(b), "loss": float(v)} for c, a, b, v in rows
        ],
    }


def _fid(fids: Sequence[FidCurve], target: float) -> dict[str, Any]:
    rows = [{"fit": None, "why": None} | row for row in beside(fids, target)]
    for row, curve in zip(rows, fids, strict=True):
        if not curve.ours and len(curve.points.steps) < _FITTED:
            continue
        law = law_of_points(thinned(curve.points, 0))
        row["fit"], row["why"] = with_intervals(law.fit, law.redrawn) if law.fit else None, law.why
    return {"target": target, "rows": rows}


def to_text(report: dict[str, Any]) -> str:
    lines = []
    if report["runs"]:
        lines.append(f"{'run':28} {'parameters':>13} {'steps':>9} {'FLOPs':>9} {'GPU-hours':>9}  {report['metric']}")
    for run in report["runs"]:
        hours = "-" if run["gpu_hours"] is None else f"{run['gpu_hours']:,.1f}"
        lines.append(
            f"{run['name']:28} {run['parameters']:13,} {run['steps']:9,.0f} {run['flops']:9.3g} {hours:>9}  "
            f"{run['value']:.5g}"
        )
        lines += [f"  {line}" for line in _law_lines("E + A·step^-a", run["fit"], run["why"])]
    if surface := report["surface"]:
        lines += ["over sizes, N parameters and D images:"]
        lines += [f"  {line}" for line in _law_lines("E + A·N^-alpha + B·D^-beta", surface["fit"], None)]
        if surface["why_no_interval"]:
            lines.append(f"  {surface['why_no_interval']}")
        lines += [
            f"  {row['flops']:.0e} FLOPs: best spent on {row['parameters']:.3g} parameters and {row['images']:.3g} "
            f"images, for {row['loss']:.5g}"
            for row in surface["frontier"]
        ]
    elif report["why_no_surface"]:
        lines.append(report["why_no_surface"])
    lines += _fid_lines(report["fid"]) if report["fid"] else []
    return "\n".join([*lines, *_prediction_lines(report)])


def _law_lines(law: str, fit: dict[str, dict] | None, why: str | None) -> list[str]:
    lines = []
    if fit:
        values = (
            f"{name} {v['value']:.4g}" + (f" ({v['low']:.4g} to {v['high']:.4g})" if "low" in v else "")
            for name, v in fit.items()
        )
        lines.append(f"{law}: {', '.join(values)}")
    return [*lines, why] if why else lines


def _fid_lines(fid: dict[str, Any]) -> list[str]:
    lines = [f"{'FID':12} {'guidance':>9}  {'points, by thousands of steps':54} to {fid['target']:g}: steps, FLOPs"]
    for row in fid["rows"]:
        points = "  ".join(f"{p['step'] / 1000:g}: {p['fid']:.4g}" for p in row["points"][-_SHOWN:])
        steps, flops = row["steps_to_target"], row["flops_to_target"]
        # A curve under guidance begins far below a target of one without.
        said = steps and not (row["at_most"] and row["guidance"] == "1.5")
        reached = f"{'at most ' * row['at_most']}{steps:,.0f}, {flops:.3g}" if said else "-"
        lines.append(f"{row['name']:12} {row['guidance']:>9}  {points:54} {reached}")
        lines += [f"  {line}" for line in _law_lines("E + A·step^-a", row["fit"], row["why"])]
    return lines


def _prediction_lines(report: dict[str, Any]) -> list[str]:
    lines = []
    for p in [*report["scored"], *report["predictions"]]:
        between = (
            "no interval"
            if p["low"] is None
            else f"{100 * p['level']:.0f} % between {p['low']:.5g} and {p['high']:.5g}"
        )
        line = f"{p['of']}, said {p['made'][:10]}: {p['metric']} {p['value']:.5g}, {between}"
        if p["measured"] is not None:
            verdict = {True: ", inside", False: ", outside", None: ""}[p["inside"]]
            line += f"; measured {p['measured']:.5g}, off by {100 * p['error']:+.2f} %{verdict}"
        lines.append(line)
    return lines
