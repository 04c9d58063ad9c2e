"""Published FID curves: FID-50K at 256 x 256 by training step, without and with guidance.

A step is 256 images. FLOPs are those of three forward passes of 256 tokens, counted alike for all networks: twice the
multiply-adds that papers call FLOPs, with those of attention, which FiT's leaves out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fitv2_scale.config.families import published_model
from fitv2_scale.model.counts import forward_flops
from fitv2_scale.planning.scaling.read_curves import Curve, Series, is_fid

BATCH = 256
_STEPS = (400_000, 1_000_000, 1_500_000, 2_000_000)
# FiTv2 (arXiv 2410.13925), Table II. According to it DiT-B, SiT-B and FiT-B broke down after their last points.
_ABLATION = {
    "DiT-B/2": ((45.33, 33.27), (22.21, 12.59)),
    "SiT-B/2": ((36.70, 27.13), (16.31, 9.30)),
    "FiT-B/2": ((36.36, 29.14, 26.08), (18.86, 11.06, 9.23)),
    "FiTv2-B/2": ((26.03, 19.02, 17.70, 16.52), (9.45, 5.51, 4.73, 4.30)),
}
MODELS = {
    "DiT-B/2": published_model("DiT", 12, 768, 12),
    "SiT-B/2": published_model("SiT", 12, 768, 12),
    "FiT-B/2": published_model("FiT", 12, 768, 12),
    "FiTv2-B/2": published_model("FiTv2", 15, 768, 12),
    "FiTv2-XL/2": published_model("FiTv2", 36, 1152, 16),
    "FiTv2-3B/2": published_model("FiTv2", 40, 2304, 24),
}
_FINAL = {"FiTv2-XL/2": (2_000_000, 2.26), "FiTv2-3B/2": (1_000_000, 2.15)}  # Table IV, guidance 1.5


@dataclass(frozen=True)
class FidCurve:
    """FID by step of one network, published or ours."""

    name: str
    guidance: str  # "1", "1.5", or the metric's name for one of our runs
    points: Series
    flops_a_step: float
    ours: bool  # False: published


def published_curves() -> list[FidCurve]:
    found = []
    for name, columns in _ABLATION.items():
        for guidance, fids in zip(("1", "1.5"), columns, strict=True):
            found.append(_fid_curve(name, guidance, _STEPS[: len(fids)], fids))
    return found + [_fid_curve(name, "1.5", (step,), (fid,)) for name, (step, fid) in _FINAL.items()]


def _fid_curve(name: str, guidance: str, steps: Sequence[int], fids: Sequence[float]) -> FidCurve:
    a_step = 3.0 * forward_flops(MODELS[name], 256) * BATCH
    return FidCurve(name, guidance, Series(np.array(steps), np.array(fids)), a_step, ours=False)


def fid_curves_of(curve: Curve) -> list[FidCurve]:
    """One curve for each FID metric that a run has recorded."""
    a_step = curve.batch * curve.flops_an_image()
    return [FidCurve(curve.name, m, points, a_step, ours=True) for m, points in curve.series.items() if is_fid(m)]


def steps_to_reach(target: float, points: Series) -> tuple[float | None, bool]:
    """The step at which a falling curve first reaches ``target`` (interpolated linearly in log(step) and log(FID); None
    if it does not), and whether its first point is already below ``target``, so that the step is an upper bound."""
    steps, values = np.log(points.steps), np.log(points.values)
    if values[0] <= np.log(target):
        return float(points.steps[0]), bool(values[0] < np.log(target))
    for i in range(1, len(steps)):
        if values[i] <= np.log(target):
            share = (np.log(target) - values[i - 1]) / (values[i] - values[i - 1])
            return float(np.exp(steps[i - 1] + share * (steps[i] - steps[i - 1]))), False
    return None, False


def comparison_rows(curves: Sequence[FidCurve], target: float) -> list[dict[str, Any]]:
    """A row for each curve: its points, and the steps and FLOPs to ``target``."""
    rows = []
    for curve in curves:
        needed, at_most = steps_to_reach(target, curve.points)
        rows.append(
            {
                "name": curve.name,
                "ours": curve.ours,
                "guidance": curve.guidance,
                "points": [
                    {"step": float(s), "flops": float(s * curve.flops_a_step), "fid": float(v)}
                    for s, v in zip(curve.points.steps, curve.points.values, strict=True)
                ],
                "steps_to_target": needed,
                "flops_to_target": needed and needed * curve.flops_a_step,
                "at_most": at_most,
            }
        )
    return rows
