"""The report of `fitv2 curves`, as plain data and as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.errors import UserError
from fitv2_scale.planning.scaling.compare_families import Comparison, compare
from fitv2_scale.planning.scaling.families_text import families_lines
from fitv2_scale.planning.scaling.laws import (
    RunLaw,
    SurfaceLaw,
    law_of_points,
    law_of_run,
    law_of_sizes,
    with_intervals,
)
from fitv2_scale.planning.scaling.meaning import first_difference
from fitv2_scale.planning.scaling.predictions import PredictionFile, PredictionRequest, predict, score
from fitv2_scale.planning.scaling.published_fid import FidCurve, comparison_rows, fid_curves_of, published_curves
from fitv2_scale.planning.scaling.read_curves import AXES, Curve, common_loss, log_binned

TARGET = 26.08  # FID of FiT-B/2 at its last point, 1,500K steps
_FRONTIER = 6  # rows
_FITTED = 4  # fewest points of a published curve to fit: the law then has one degree of freedom left
_SHOWN = 5  # FIDs per curve


@dataclass(frozen=True)
class CurvesOptions:
    """The options of `fitv2 curves`."""

    folder: Path
    published: bool = False
    target: float | None = None  # FID; None: TARGET, and for a comparison of families where its baseline ends
    predict: tuple[str, ...] = ()
    baseline: str | None = None

    @property
    def target_fid(self) -> float:
        return self.target or TARGET


@dataclass(frozen=True)
class Analysis:
    """The laws, of ``metric``, the FID curves and the comparisons of families, for report and plots."""

    metric: str
    laws: list[tuple[Curve, RunLaw]]
    surface: SurfaceLaw | None
    why_no_surface: str | None
    fids: list[FidCurve]
    comparisons: Sequence[Comparison] = ()


def analyse(curves: Sequence[Curve], options: CurvesOptions) -> Analysis:
    """Fits the laws. Raises UserError if there are neither curves nor published points."""
    if not curves and not options.published:
        raise UserError("give runs, --experiment NAME, or --published (only the paper's points)")
    metric = common_loss(curves)
    laws = [(curve, law_of_run(curve, metric)) for curve in curves]
    surface = why = None
    if difference := first_difference({curve.name: curve.meaning for curve in curves}, metric):
        why = f"there is no law over sizes: {difference}; leave one of them out"
    elif curves:
        try:
            surface = law_of_sizes(curves, metric)
        except UserError as error:
            why = str(error)
    fids = [fid for curve in curves for fid in fid_curves_of(curve)] + (published_curves() if options.published else [])
    comparisons = compare(laws, metric, options.published, options.baseline, options.target)
    return Analysis(metric, laws, surface, why, fids, comparisons)


def build_report(analysis: Analysis, options: CurvesOptions) -> dict[str, Any]:
    """The report. Also makes and keeps the requested predictions, and scores the earlier ones. Raises UserError."""
    kept, curves = PredictionFile(options.folder), [curve for curve, _ in analysis.laws]
    before = [score(prediction, curves) for prediction in kept.all()]
    requests = [PredictionRequest.parse(text) for text in options.predict]
    made = [predict(request, analysis.metric, analysis.surface, analysis.laws) for request in requests]
    for prediction in made:
        kept.add(prediction)
    return {
        "metric": analysis.metric if analysis.laws else None,
        "runs": [_run(curve, law, analysis.metric) for curve, law in analysis.laws],
        "surface": _surface(analysis.surface) if analysis.surface else None,
        "why_no_surface": analysis.why_no_surface,
        "fid": _fid(analysis.fids, options.target_fid) if analysis.fids else None,
        "families": [comparison.as_record() for comparison in analysis.comparisons],
        "predictions": [score(prediction, curves) for prediction in made],
        "scored": before,
    }


def _run(curve: Curve, law: RunLaw, metric: str) -> dict[str, Any]:
    series = curve.series[metric]
    last = series.steps[-1:]
    reached = {axis: curve.along(axis, last) for axis in AXES}
    return {
        "name": curve.name,
        "network": curve.network,
        "objective": curve.objective,
        "parameters": curve.parameters,
        "batch": curve.batch,
        **{axis: None if at is None else float(at[0]) for axis, at in reached.items()},
        "value": float(series.values[-max(1, len(series.values) // 50) :].mean()),
        "points": len(law.points.steps),
        "fit": with_intervals(law.fit, law.refits) if law.fit else None,
        "why": law.why,
    }


def _surface(law: SurfaceLaw) -> dict[str, Any]:
    flops = 10.0 ** np.arange(17, 17 + _FRONTIER)
    n, images = law.best(flops)
    rows = zip(flops, n, images, law.fit(n, images), strict=True)
    return {
        "fit": with_intervals(law.fit, law.refits),
        "why_no_interval": law.why_no_interval,
        "flops_an_image": {"factor": law.flops_factor, "exponent": law.flops_exponent},
        "frontier": [
            {"flops": float(c), "parameters": float(a), "images": float(b), "loss": float(v)} for c, a, b, v in rows
        ],
    }


def _fid(fids: Sequence[FidCurve], target: float) -> dict[str, Any]:
    rows = [{"fit": None, "why": None} | row for row in comparison_rows(fids, target)]
    for row, curve in zip(rows, fids, strict=True):
        if not curve.ours and len(curve.points.steps) < _FITTED:
            continue
        law = law_of_points(log_binned(curve.points, 0))
        row["fit"], row["why"] = with_intervals(law.fit, law.refits) if law.fit else None, law.why
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
        lines += ["law over sizes, with N parameters and D images:"]
        lines += [f"  {line}" for line in _law_lines("E + A·N^-alpha + B·D^-beta", surface["fit"], None)]
        if surface["why_no_interval"]:
            lines.append(f"  {surface['why_no_interval']}")
        lines += [
            f"  {row['flops']:.0e} FLOPs: best are {row['parameters']:.3g} parameters and {row['images']:.3g} images, "
            f"with a loss of {row['loss']:.5g}"
            for row in surface["frontier"]
        ]
    elif report["why_no_surface"]:
        lines.append(report["why_no_surface"])
    lines += _fid_lines(report["fid"]) if report["fid"] else []
    lines += families_lines(report["families"], {run["name"]: run["objective"] for run in report["runs"]})
    return "\n".join([*lines, *prediction_lines(report)])


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
    lines = [f"{'FID':12} {'guidance':>9}  {'at thousands of steps':54} steps and FLOPs to {fid['target']:g}"]
    for row in fid["rows"]:
        points = "  ".join(f"{p['step'] / 1000:g}: {p['fid']:.4g}" for p in row["points"][-_SHOWN:])
        steps, flops = row["steps_to_target"], row["flops_to_target"]
        # With guidance a curve begins far below a target that was reached without.
        meaningful = steps and not (row["at_most"] and row["guidance"] == "1.5")
        reached = f"{'at most ' * row['at_most']}{steps:,.0f}, {flops:.3g}" if meaningful else "-"
        lines.append(f"{row['name']:12} {row['guidance']:>9}  {points:54} {reached}")
        lines += [f"  {line}" for line in _law_lines("E + A·step^-a", row["fit"], row["why"])]
    return lines


def prediction_lines(report: dict[str, Any]) -> list[str]:
    """A line for each prediction of a report, with what was measured since."""
    lines = []
    for p in [*report["scored"], *report["predictions"]]:
        between = (
            "no interval"
            if p["low"] is None
            else f"{100 * p['level']:.0f} % interval {p['low']:.5g} to {p['high']:.5g}"
        )
        line = f"{p['of']}, predicted {p['made'][:10]}: {p['metric']} {p['value']:.5g}, {between}"
        if p["measured"] is not None:
            verdict = {True: ", inside", False: ", outside", None: ""}[p["inside"]]
            error = "" if p["error"] is None else f", error {100 * p['error']:+.2f} %"
            line += f"; measured {p['measured']:.5g}{error}{verdict}"
        lines.append(line)
    return lines
