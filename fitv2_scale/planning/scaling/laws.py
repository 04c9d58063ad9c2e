"""What a set of curves says: a law for each run, one for all sizes, and where compute is spent best."""

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields

import numpy as np

from data_sharding.errors import UserError
from fitv2_scale.planning.scaling.bootstrap import DRAWS, Residuals, as_rows, interval, redrawn
from fitv2_scale.planning.scaling.fits import CurveFit, SurfaceFit, fit_curve, fit_surface, refit_curve, refit_surface
from fitv2_scale.planning.scaling.read_curves import Curve, Series, thinned

_CURVE_PARAMETERS, _SURFACE_PARAMETERS = len(fields(CurveFit)), len(fields(SurfaceFit))
_SIZES = 3  # a floor, a factor and an exponent for N


@dataclass(frozen=True)
class RunLaw:
    """L = E + A·step^-a of one run, or ``why`` there is none; ``redrawn``, empty where no interval can be given."""

    points: Series
    fit: CurveFit | None
    redrawn: tuple[CurveFit, ...]
    why: str | None


@dataclass(frozen=True)
class SurfaceLaw:
    """L = E + A·N^-alpha + B·D^-beta, N the parameters and D the images trained on; and C = per_image·N^grows·D."""

    fit: SurfaceFit
    redrawn: tuple[SurfaceFit, ...]
    why_no_interval: str | None
    per_image: float
    grows: float

    def best(self, flops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Parameters and images that reach the least loss for ``flops``: where the derivative along C is zero."""
        f, k, images_of_one = self.fit, self.grows, flops / self.per_image
        ratio = f.alpha * f.A / (k * f.beta * f.B)
        n = (ratio * images_of_one**f.beta) ** (1 / (f.alpha + k * f.beta))
        return n, images_of_one / n**k


def law_of_points(points: Series, draws: int = DRAWS) -> RunLaw:
    """For points that stand for themselves: losses, or FIDs, by step."""
    x, y = points.steps, points.values
    if len(x) < _CURVE_PARAMETERS:
        why = f"{len(x)} points do not determine E, A and a: {_CURVE_PARAMETERS} are needed, one more for an interval"
        return RunLaw(points, None, (), why)
    fit = fit_curve(x, y)
    fitted = np.log(fit(x))

    drawn = redrawn([Residuals("one", np.log(y) - fitted)], _CURVE_PARAMETERS, draws)
    again = []
    if drawn:
        losses = np.exp(fitted + as_rows([[noise for _, noise in row] for row in drawn], 0.0))
        again = refit_curve(np.tile(x, (len(drawn), 1)), losses, fit)
    why = None if again else f"{len(x)} points leave no degree of freedom over, so there is no interval"
    return RunLaw(points, fit, tuple(again), why)


def law_of_run(curve: Curve, metric: str, draws: int = DRAWS) -> RunLaw:
    """From the end of the warm-up on."""
    law = law_of_points(thinned(curve.series[metric], curve.warmup), draws)
    if law.fit is None and curve.last <= curve.warmup:
        why = f"its {curve.last} steps are no more than its warm-up of {curve.warmup}"
        return RunLaw(law.points, None, (), why)
    return law


def law_of_sizes(curves: Sequence[Curve], metric: str, draws: int = DRAWS) -> SurfaceLaw:
    """Raises UserError if there are fewer than three sizes, or no points behind the warm-up."""
    found = {curve.name: thinned(curve.series[metric], curve.warmup) for curve in curves}
    used = [curve for curve in curves if len(found[curve.name].steps)]
    sizes = {curve.size for curve in used}
    if len(sizes) < _SIZES:
        raise UserError(
            f"a law over sizes needs runs of {_SIZES} sizes at least, with points behind their warm-up; "
            f"there {'is' if len(sizes) == 1 else 'are'} {len(sizes)}: train another size, or be content with each "
            "run's own law"
        )
    points = [found[curve.name] for curve in used]
    n = [np.full(len(p.steps), float(curve.parameters)) for curve, p in zip(used, points, strict=True)]
    d = [curve.along("images", p.steps) for curve, p in zip(used, points, strict=True)]
    y = [p.values for p in points]
    fit = fit_surface(*map(np.concatenate, (n, d, y)))
    per_image, grows = _cost(used)
    if len(sizes) == _SIZES:
        why = "three sizes determine E, A and alpha, and leave no degree of freedom over to judge them by: no interval"
        return SurfaceLaw(fit, (), why, per_image, grows)
    fitted = [np.log(fit(a, b)) for a, b in zip(n, d, strict=True)]
    residuals = [Residuals(c.size, np.log(v) - f) for c, v, f in zip(used, y, fitted, strict=True)]

    drawn = redrawn(residuals, _SURFACE_PARAMETERS, draws)
    again = []
    if drawn:
        losses = as_rows([[np.exp(fitted[i] + noise) for i, noise in row] for row in drawn], np.nan)
        at = [as_rows([[part[i] for i, _ in row] for row in drawn], 1.0) for part in (n, d)]
        again = refit_surface(*at, losses, fit)
    why = None if again else "the points leave no degree of freedom over: no interval"
    return SurfaceLaw(fit, tuple(again), why, per_image, grows)


def _cost(curves: Sequence[Curve]) -> tuple[float, float]:
    """FLOPs of training on an image as per_image·N^grows, through the sizes at hand."""
    sizes = {curve.size: (curve.parameters, curve.flops_an_image()) for curve in curves}
    n, flops = np.log(np.array(list(sizes.values()), float)).T
    grows, at_one = np.polyfit(n, flops, 1)
    return float(np.exp(at_one)), float(grows)


def with_intervals(fit: CurveFit | SurfaceFit, again: Sequence[CurveFit | SurfaceFit]) -> dict[str, dict]:
    """{"E": {"value": 0.5, "low": 0.49, "high": 0.51}, …}; without low and high where there is no interval."""
    named = {name: {"value": value} for name, value in asdict(fit).items()}
    if again:
        for name, values in zip(named, zip(*map(astuple, again), strict=True), strict=True):
            named[name]["low"], named[name]["high"] = interval(values)
    return named
