"""Plots of curves, their laws and the compute frontier. Axes without data are left out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fitv2_scale.planning.scaling.compare_families import Comparison
from fitv2_scale.planning.scaling.laws import RunLaw, SurfaceLaw
from fitv2_scale.planning.scaling.published_fid import FidCurve
from fitv2_scale.planning.scaling.read_curves import AXES, Curve, log_binned

_LABELS = {"steps": "steps", "images": "images", "flops": "FLOPs", "gpu_hours": "GPU-hours"}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
_SHOWN = 400  # points of a curve


def loss_plot(laws: Sequence[tuple[Curve, RunLaw]], metric: str, file: Path) -> None:
    """``metric`` of each run against each axis that it recorded, with its law dashed."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, axis in zip(figure.subplots(2, 2).flat, AXES, strict=True):
        for i, (curve, law) in enumerate(laws):
            _draw_loss(axes, curve, law, metric, axis, _colour(i))
        _finish(axes, _LABELS[axis], _words(metric))
    _drop_empty(figure)
    figure.suptitle(f"{_words(metric)} while training; dashed: law E + A·step^-a of each run")
    figure.savefig(file, dpi=120)


def _draw_loss(axes: Axes, curve: Curve, law: RunLaw, metric: str, axis: str, colour: str) -> None:
    points = log_binned(curve.series[metric], 0, _SHOWN)
    if (along := curve.along(axis, points.steps)) is not None:
        axes.plot(along, points.values, color=colour, lw=1.2, label=f"{_size_name(curve)}  {curve.name}")
    if law.fit is None:
        return
    steps = np.geomspace(law.points.steps[0], law.points.steps[-1], 100)
    if (along := curve.along(axis, steps)) is not None:
        axes.plot(along, law.fit(steps), color="black", lw=1, ls="--")


def fid_plot(curves: Sequence[FidCurve], target: float, file: Path) -> None:
    """FID against steps and FLOPs; solid lines for our runs, dotted for published ones, open marks with guidance."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    colours = {name: _colour(i) for i, name in enumerate(dict.fromkeys(curve.name for curve in curves))}
    for axes, by in zip(figure.subplots(1, 2), ("steps", "flops"), strict=True):
        for curve in curves:
            scale = 1.0 if by == "steps" else curve.flops_a_step
            points = log_binned(curve.points, 0)
            axes.plot(
                points.steps * scale,
                points.values,
                "o-" if curve.ours else "s:",
                ms=4,
                lw=1.2,
                color=colours[curve.name],
                mfc=colours[curve.name] if curve.ours or curve.guidance == "1" else "none",
                label=f"{curve.name}, {'' if curve.ours else 'guidance '}{curve.guidance}",
            )
        axes.axhline(target, color="grey", lw=0.8, ls="--", label=f"target, FID {target:g}")
        _finish(axes, _LABELS[by], "FID")
    if legend := figure.axes[0].get_legend():
        legend.remove()  # the same as the other one, and it would cover points
    published = "FID-50K at 256x256 while training, as published"
    figure.suptitle(f"FID of runs; dotted: {published}" if any(curve.ours for curve in curves) else published)
    figure.savefig(file, dpi=120)


def families_plot(comparison: Comparison, file: Path) -> None:
    """The metric of each family against each axis that one of them recorded, a line for each run, and the target."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, axis in zip(figure.subplots(2, 2).flat, AXES, strict=True):
        for i, (name, repeats) in enumerate(comparison.curves.items()):
            for k, repeat in enumerate(repeats):
                if (along := repeat.along(axis, repeat.points.steps)) is not None:
                    label = name if k == 0 else "_"  # matplotlib leaves it out of the legend
                    axes.plot(along, repeat.points.values, "o-", ms=3, lw=1.2, color=_colour(i), label=label)
        if axes.lines:
            axes.axhline(comparison.target, color="grey", lw=0.8, ls="--", label=f"target, {comparison.target:.5g}")
        _finish(axes, _LABELS[axis], _words(comparison.metric))
    _drop_empty(figure)
    figure.suptitle(f"{_words(comparison.metric)} by family, and the target of ratios to {comparison.baseline}")
    figure.savefig(file, dpi=120)


def frontier_plot(curves: Sequence[Curve], law: SurfaceLaw, metric: str, file: Path) -> None:
    """Left: loss against FLOPs, measured and by the law over sizes, and the least loss for each number of FLOPs.
    Right: the parameters and the images with which that is reached."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    spans = []
    for i, curve in enumerate(curves):
        points = log_binned(curve.series[metric], curve.warmup)
        if not len(points.steps):
            continue
        flops, images = curve.along("flops", points.steps), curve.along("images", points.steps)
        spans += [flops[0], flops[-1]]
        left.plot(flops, points.values, ".", ms=4, color=_colour(i), label=_size_name(curve))
        left.plot(flops, law.fit(curve.parameters, images), color=_colour(i), lw=0.8)
    flops = np.geomspace(min(spans), 30 * max(spans), 100)
    n, images = law.best(flops)
    left.plot(flops, law.fit(n, images), "k--", lw=1.2, label="least loss by the law")
    _finish(left, "FLOPs", _words(metric))
    right.loglog(flops, n, color=_colour(0), label="parameters")
    right.loglog(flops, images, color=_colour(1), label="images")
    right.axvline(max(spans), color="grey", lw=0.8, ls=":", label="measured up to here")
    right.set(xlabel="FLOPs", ylabel="parameters, images")
    right.grid(alpha=0.25, lw=0.5)
    right.legend(fontsize=7)
    left.set_title("measured points and the law over sizes", fontsize=10)
    right.set_title("best parameters and images by the law", fontsize=10)
    figure.suptitle("Compute frontier")
    figure.savefig(file, dpi=120)


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _size_name(curve: Curve) -> str:
    n = curve.parameters
    return f"{n / 1e9:.3g}B" if n >= 1e9 else f"{n / 1e6:.3g}M"


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.grid(alpha=0.25, which="both", lw=0.5)
    if axes.lines:
        axes.legend(fontsize=7)


def _drop_empty(figure: Figure) -> None:
    for axes in list(figure.axes):
        if not axes.lines:
            axes.remove()
