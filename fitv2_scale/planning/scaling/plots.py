"""Pictures of curves, their laws and the frontier. Axes without data are left out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fitv2_scale.planning.scaling.laws import RunLaw, SurfaceLaw
from fitv2_scale.planning.scaling.published_fid import FidCurve
from fitv2_scale.planning.scaling.read_curves import AXES, Curve, thinned

_LABELS = {"steps": "steps", "images": "images", "flops": "FLOPs", "gpu_hours": "GPU-hours"}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
_SHOWN = 400  # points of a curve


def colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


def loss_picture(laws: Sequence[tuple[Curve, RunLaw]], metric: str, file: Path) -> None:
    """``metric`` of each run against each axis that it tells, its law dashed."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    for place, axis in zip(figure.subplots(2, 2).flat, AXES, strict=True):
        for i, (curve, law) in enumerate(laws):
            _draw_loss(place, curve, law, metric, axis, colour(i))
        _finish(place, _LABELS[axis], metric.replace("_", " "))
    _drop_empty(figure)
    figure.savefig(file, dpi=120)


def _draw_loss(place: Axes, curve: Curve, law: RunLaw, metric: str, axis: str, of: str) -> None:
    points = thinned(curve.series[metric], 0, _SHOWN)
    along = curve.along(axis, points.steps)
    if along is None:
        return
    place.plot(along, points.values, color=of, lw=1.2, label=f"{size_name(curve)}  {curve.name}")
    if law.fit is not None:
        steps = np.geomspace(law.points.steps[0], law.points.steps[-1], 100)
        place.plot(curve.along(axis, steps), law.fit(steps), color="black", lw=1, ls="--")


def fid_picture(curves: Sequence[FidCurve], target: float, file: Path) -> None:
    """FID against steps and FLOPs; ours drawn through, published ones dotted, with open marks under guidance."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    colours = {name: colour(i) for i, name in enumerate(dict.fromkeys(curve.name for curve in curves))}
    for place, by in zip(figure.subplots(1, 2), ("steps", "flops"), strict=True):
        for curve in curves:
            scale = 1.0 if by == "steps" else curve.flops_a_step
            points = thinned(curve.points, 0)
            place.plot(
                points.steps * scale,
                points.values,
                "o-" if curve.ours else "s:",
                ms=4,
                lw=1.2,
                color=colours[curve.name],
                mfc=colours[curve.name] if curve.ours or curve.guidance == "1" else "none",
                label=f"{curve.name}, {'' if curve.ours else 'guidance '}{curve.guidance}",
            )
        place.axhline(target, color="grey", lw=0.8, ls="--", label=f"target, FID {target:g}")
        _finish(place, _LABELS[by], "FID")
    figure.axes[0].get_legend().remove()  # the same as that of the other, and in the way of points
    published = "FID-50K at 256x256 while training, as published"
    figure.suptitle(f"FID of runs; dotted: {published}" if any(curve.ours for curve in curves) else published)
    figure.savefig(file, dpi=120)


def frontier_picture(curves: Sequence[Curve], law: SurfaceLaw, metric: str, file: Path) -> None:
    """Left: loss against FLOPs, measured and by the law of each size, and the least loss for each number of FLOPs.
    Right: with which network that is reached, and on how many images."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    spans = []
    for i, curve in enumerate(curves):
        points = thinned(curve.series[metric], curve.warmup)
        if not len(points.steps):
            continue
        flops, images = curve.along("flops", points.steps), curve.along("images", points.steps)
        spans += [flops[0], flops[-1]]
        left.plot(flops, points.values, ".", ms=4, color=colour(i), label=size_name(curve))
        left.plot(flops, law.fit(curve.parameters, images), color=colour(i), lw=0.8)
    flops = np.geomspace(min(spans), 30 * max(spans), 100)
    n, images = law.best(flops)
    left.plot(flops, law.fit(n, images), "k--", lw=1.2, label="least loss by the law")
    _finish(left, "FLOPs", metric.replace("_", " "))
    right.loglog(flops, n, color=colour(0), label="parameters")
    right.loglog(flops, images, color=colour(1), label="images")
    right.axvline(max(spans), color="grey", lw=0.8, ls=":", label="measured up to here")
    right.set(xlabel="FLOPs", ylabel="of the best network")
    right.grid(alpha=0.25, lw=0.5)
    right.legend(fontsize=7)
    figure.savefig(file, dpi=120)


def size_name(curve: Curve) -> str:
    n = curve.parameters
    return f"{n / 1e9:.3g}B" if n >= 1e9 else f"{n / 1e6:.3g}M"


def _finish(place: Axes, x: str, y: str) -> None:
    place.set_xscale("log")
    place.set_yscale("log")
    place.set_xlabel(x)
    place.set_ylabel(y)
    place.yaxis.set_major_formatter("{x:g}")
    place.yaxis.set_minor_formatter("{x:.3g}")
    place.grid(alpha=0.25, which="both", lw=0.5)
    if place.lines:
        place.legend(fontsize=7)


def _drop_empty(figure: Figure) -> None:
    for place in list(figure.axes):
        if not place.lines:
            place.remove()
