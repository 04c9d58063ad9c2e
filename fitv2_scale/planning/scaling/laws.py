"""Laws fitted to a set of curves: one for each run, one over all sizes, and the best use of compute by the latter."""

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields

import numpy as np

from data_sharding.errors import UserError
from fitv2_scale.planning.scaling.bootstrap import DRAWS, Residuals, as_rows, interval, resample
from fitv2_scale.planning.scaling.fits import CurveFit, SurfaceFit, fit_curve, fit_surface, refit_curve, refit_surface
from fitv2_scale.planning.scaling.read_curves import Curve, Series, log_binned

_CURVE_PARAMETERS, _SURFACE_PARAMETERS = len(fields(CurveFit)), len(fields(SurfaceFit))
_SIZES = 3  # as many as the parameters that depend on size: floor, factor and exponent of N


@dataclass(frozen=True)
class RunLaw:
    """L = E + A·step^-a of one run. ``fit`` is None where there is no law; ``refits``, the bootstrap samples, is empty
    where there is no interval; ``why`` gives the reason."""

    points: Series
    fit: CurveFit | None
    refits: tuple[CurveFit, ...]
    why: str | None


@dataclass(frozen=True)
class SurfaceLaw:
    """L = E + A·N^-alpha + B·D^-beta, with N the parameters and D the images trained on; and the FLOPs of training,
    C = flops_factor·N^flops_exponent·D."""

    fit: SurfaceFit
    refits: tuple[SurfaceFit, ...]
    why_no_interval: str | None
    flops_factor: float
    flops_exponent: float

    def best(self, flops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Parameters and images with the least loss for ``flops``: where the derivative along constant C is zero."""
        f, k, images_of_one = self.fit, self.flops_exponent, flops / self.flops_factor
        ratio = f.alpha * f.A / (k * f.beta * f.B)
        n = (ratio * images_of_one**f.beta) ** (1 / (f.alpha + k * f.beta))
        return n, images_of_one / n**k


def law_of_points(points: Series, draws: int = DRAWS) -> RunLaw:
    """The law of a series of losses or FIDs by step, without averaging."""
    x, y = points.steps, points.values
    if len(x) < _CURVE_PARAMETERS:
        why = f"{len(x)} points do not determine E, A and a: {_CURVE_PARAMETERS} are needed, 1 more for an interval"
        return RunLaw(points, None, (), why)
    fit = fit_curve(x, y)
    fitted = np.log(fit(x))

    samples = resample([Residuals("one", np.log(y) - fitted)], _CURVE_PARAMETERS, draws)
    refits = []
    if samples:
        losses = np.exp(fitted + as_rows([[noise for _, noise in row] for row in samples], 0.0))
        refits = refit_curve(np.tile(x, (len(samples), 1)), losses, fit)
    why = None if refits else f"{len(x)} points leave no degree of freedom, so there is no interval"
    return RunLaw(points, fit, tuple(refits), why)


def law_of_run(curve: Curve, metric: str, draws: int = DRAWS) -> RunLaw:
    """The law of a run's ``metric``, from the end of its warm-up on."""
    law = law_of_points(log_binned(curve.series[metric], curve.warmup), draws)
    if law.fit is None and curve.last <= curve.warmup:
        why = f"its {curve.last} steps do not go beyond its warm-up of {curve.warmup}"
        return RunLaw(law.points, None, (), why)
    return law


def law_of_sizes(curves: Sequence[Curve], metric: str, draws: int = DRAWS) -> SurfaceLaw:
    """The law over sizes. Raises UserError if there are fewer than three sizes with points after their warm-up."""
    found = {curve.name: log_binned(curve.series[metric], curve.warmup) for curve in curves}
    used = [curve for curve in curves if len(found[curve.name].steps)]
    sizes = {curve.size for curve in used}
    if len(sizes) < _SIZES:
        raise UserError(
            f"a law over sizes needs runs of at least {_SIZES} sizes with points after their warm-up; "
            f"there {'is' if len(sizes) == 1 else 'are'} {len(sizes)}: train another size, or use the law of each run"
        )
    points = [found[curve.name] for curve in used]
    n = [np.full(len(p.steps), float(curve.parameters)) for curve, p in zip(used, points, strict=True)]
    d = [curve.along("images", p.steps) for curve, p in zip(used, points, strict=True)]
    y = [p.values for p in points]
    fit = fit_surface(np.concatenate(n), np.concatenate(d), np.concatenate(y))
    flops_factor, flops_exponent = _cost(used)
    if len(sizes) == _SIZES:
        why = "three sizes just determine E, A and alpha, and leave no degree of freedom: there is no interval"
        return SurfaceLaw(fit, (), why, flops_factor, flops_exponent)
    fitted = [np.log(fit(a, b)) for a, b in zip(n, d, strict=True)]
    residuals = [Residuals(c.size, np.log(v) - f) for c, v, f in zip(used, y, fitted, strict=True)]

    samples = resample(residuals, _SURFACE_PARAMETERS, draws)
    refits = []
    if samples:
        losses = as_rows([[np.exp(fitted[i] + noise) for i, noise in row] for row in samples], np.nan)
        n_rows, d_rows = (as_rows([[part[i] for i, _ in row] for row in samples], 1.0) for part in (n, d))
        refits = refit_surface(n_rows, d_rows, losses, fit)
    why = None if refits else "the points leave no degree of freedom: there is no interval"
    return SurfaceLaw(fit, tuple(refits), why, flops_factor, flops_exponent)


def _cost(curves: Sequence[Curve]) -> tuple[float, float]:
    """Factor and exponent of the FLOPs to train on an image, as a power law in N through the sizes of ``curves``."""
    sizes = {curve.size: (curve.parameters, curve.flops_an_image()) for curve in curves}
    n, flops = np.log(np.array(list(sizes.values()), float)).T
    flops_exponent, at_one = np.polyfit(n, flops, 1)
    return float(np.exp(at_one)), float(flops_exponent)


def with_intervals(fit: CurveFit | SurfaceFit, refits: Sequence[CurveFit | SurfaceFit]) -> dict[str, dict]:
    """{"E": {"value": 0.5, "low": 0.49, "high": 0.51}, …}; without low and high where there is no interval."""
    named = {name: {"value": value} for name, value in asdict(fit).items()}
    if refits:
        for name, values in zip(named, zip(*map(astuple, refits), strict=True), strict=True):
            named[name]["low"], named[name]["high"] = interval(values)
    return named
