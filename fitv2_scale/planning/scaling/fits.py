"""Power laws with a floor, fitted to losses: L = E + A·x^-a of one run, L = E + A·N^-α + B·D^-β over sizes.

The objective is Hoffmann et al.'s (arXiv 2203.15556, D.3): Huber's loss with δ = 1e-3 on residuals of log L, each
term's logarithm a parameter. It is divided by δ², and Gauss-Newton steps finish the result of L-BFGS, which stops early
on a small objective, as Besiroglu et al. (arXiv 2404.10102) found in the original fit. Starting points come from a grid
over the exponents, with the factors of each by non-negative least squares (variable projection).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import least_squares, minimize, nnls

DELTA = 1e-3
_STARTS = 3  # starting points taken from the grid
_STEPS = 60  # of a fit that starts near the solution
_EXPONENTS = np.geomspace(0.02, 2.0, 24)
_STEEPEST, _FLATTEST = 5.0, 1e-3
_SMALLEST = 14.0  # no term's logarithm is further below that of the least loss
_LARGEST = 6.0  # nor further above that of the greatest loss


@dataclass(frozen=True)
class CurveFit:
    """L = E + A·x^-a."""

    E: float
    A: float
    a: float

    def __call__(self, x: np.ndarray | float) -> np.ndarray:
        return self.E + self.A * np.asarray(x, float) ** -self.a


@dataclass(frozen=True)
class SurfaceFit:
    """L = E + A·N^-alpha + B·D^-beta."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def __call__(self, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        return self.E + self.A * np.asarray(n, float) ** -self.alpha + self.B * np.asarray(d, float) ** -self.beta


def fit_curve(x: np.ndarray, loss: np.ndarray) -> CurveFit:
    """``x`` and ``loss``: (n,), positive, n >= 3."""
    law = _Law([np.asarray(x, float)], np.asarray(loss, float))
    return CurveFit(*_plain(law.fit(), law.centres))


def fit_surface(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> SurfaceFit:
    """``n``, ``d`` and ``loss``: (points,), positive, at least 5 points of 3 sizes."""
    law = _Law([np.asarray(n, float), np.asarray(d, float)], np.asarray(loss, float))
    return SurfaceFit(*_plain(law.fit(), law.centres))


def refit_curve(x: np.ndarray, loss: np.ndarray, start: CurveFit) -> list[CurveFit]:
    """The fit of each row of ``x`` and ``loss``, (rows, points), starting at ``start``; NaN losses are ignored."""
    thetas, centres = _refit([x], loss, start.E, [(start.A, start.a)])
    return [CurveFit(*_plain(theta, centres)) for theta in thetas]


def refit_surface(n: np.ndarray, d: np.ndarray, loss: np.ndarray, start: SurfaceFit) -> list[SurfaceFit]:
    """``refit_curve`` for surfaces."""
    thetas, centres = _refit([n, d], loss, start.E, [(start.A, start.alpha), (start.B, start.beta)])
    return [SurfaceFit(*_plain(theta, centres)) for theta in thetas]


def _plain(theta: np.ndarray, centres: Sequence[float]) -> list[float]:
    """The parameters of the law: floor, then factor and exponent of each variable."""
    found = [float(np.exp(theta[0]))]
    for (log, exponent), centre in zip(theta[1:].reshape(-1, 2), centres, strict=True):
        found += [float(np.exp(log + exponent * centre)), float(exponent)]
    return found


def _refit(
    variables: Sequence[np.ndarray], loss: np.ndarray, floor: float, terms: Sequence[tuple[float, float]]
) -> tuple[np.ndarray, list[float]]:
    """Many fits in parallel, by Levenberg-Marquardt steps on reweighted residuals; a step that does not lower Huber's
    objective is not taken. Returns θ of each and the centres."""
    used = np.isfinite(loss)
    law = _Law([v[used] for v in variables], loss[used])
    logs = [np.log(v) - c for v, c in zip(variables, law.centres, strict=True)]
    design = _designs(logs)  # (terms, rows, points, θ)
    target = np.where(used, np.log(np.where(used, loss, 1.0)), 0.0)
    start = [np.log(floor)]
    for (factor, exponent), centre in zip(terms, law.centres, strict=True):
        start += [np.log(factor) - exponent * centre, exponent]
    theta = np.tile(law.inside(np.array(start)), (len(loss), 1))
    damping = np.full(len(loss), 1e-3)
    r, slope = _residuals(design, theta, target, used)
    cost = _huber(r).sum(-1)
    for _ in range(_STEPS):
        weight = 1 / np.maximum(1, np.abs(r))
        weighted = slope * weight[..., None]
        hessian, gradient = weighted.swapaxes(1, 2) @ slope, np.einsum("rpk,rp->rk", weighted, r)
        diagonal = np.einsum("rkk->rk", hessian)
        hessian = hessian + (damping[:, None] * diagonal + 1e-9)[..., None] * np.eye(theta.shape[1])
        tried = law.inside(theta - np.linalg.solve(hessian, gradient[..., None])[..., 0])
        r_tried, slope_tried = _residuals(design, tried, target, used)
        cost_tried = _huber(r_tried).sum(-1)
        better = cost_tried < cost
        theta, cost = np.where(better[:, None], tried, theta), np.where(better, cost_tried, cost)
        r, slope = np.where(better[:, None], r_tried, r), np.where(better[:, None, None], slope_tried, slope)
        damping = np.clip(np.where(better, damping / 4, damping * 4), 1e-9, 1e9)
    return theta, law.centres


def _designs(logs: Sequence[np.ndarray]) -> np.ndarray:
    """(terms, …, θ): the logarithm of each term is this times θ. ``logs``: centred logarithms of the variables."""
    designs = np.zeros((1 + len(logs), *logs[0].shape, 1 + 2 * len(logs)))
    designs[0, ..., 0] = 1
    for k, log in enumerate(logs):
        designs[k + 1, ..., 2 * k + 1], designs[k + 1, ..., 2 * k + 2] = 1, -log
    return designs


def _residuals(
    designs: np.ndarray, theta: np.ndarray, target: np.ndarray, used: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Residuals (…, points) in units of δ, and their derivatives (…, points, θ); zero for points not ``used``."""
    logs = (designs @ theta[..., None])[..., 0]  # (terms, …, points)
    most = logs.max(0)
    weights = np.exp(logs - most)
    total = weights.sum(0)
    slope = ((weights / total)[..., None] * designs).sum(0)
    return np.where(used, most + np.log(total) - target, 0.0) / DELTA, slope * used[..., None] / DELTA


def _huber(r: np.ndarray) -> np.ndarray:
    size = np.abs(r)
    return np.where(size <= 1, r * r / 2, size - 0.5)


class _Law:
    """log L = log of a sum of terms, whose logarithms are linear in θ = (e, then factor and exponent of each variable).

    Variables are taken relative to their geometric means, so that a factor and its exponent are nearly independent.
    """

    def __init__(self, variables: Sequence[np.ndarray], loss: np.ndarray) -> None:
        self._target = np.log(loss)
        self.centres = [float(np.log(x).mean()) for x in variables]
        self._logs = [np.log(x) - c for x, c in zip(variables, self.centres, strict=True)]
        self._designs = _designs(self._logs)
        self._used = np.ones(len(loss), bool)
        least, most = self._target.min(), self._target.max()
        low = [least - _SMALLEST] + [least - _SMALLEST, _FLATTEST] * len(variables)
        high = [least] + [most + _LARGEST, _STEEPEST] * len(variables)
        self._low, self._high = np.array(low), np.array(high)

    def fit(self) -> np.ndarray:
        """θ with the least objective found."""
        found = []
        for theta in self._starts():
            bounds = list(zip(self._low, self._high, strict=True))
            options = {"maxiter": 500, "ftol": 1e-14, "gtol": 1e-9}
            descended = minimize(self._objective, theta, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
            found.append(self._finish(self.inside(descended.x)))
        return min(found, key=lambda theta: self._objective(theta)[0])

    def _starts(self) -> list[np.ndarray]:
        """The best starting points of the grid over the exponents."""
        loss, scored = np.exp(self._target), []
        for exponents in product(_EXPONENTS, repeat=len(self._logs)):
            columns = [np.ones_like(loss), *(np.exp(-a * x) for a, x in zip(exponents, self._logs, strict=True))]
            factors, residual = nnls(np.stack(columns, 1) / loss[:, None], np.ones_like(loss))
            logs = np.log(np.maximum(factors, 1e-12))
            theta = [logs[0]]
            for log, a in zip(logs[1:], exponents, strict=True):
                theta += [log, a]
            scored.append((residual, self.inside(np.array(theta))))
        return [theta for _, theta in sorted(scored, key=lambda s: s[0])[:_STARTS]]

    def inside(self, theta: np.ndarray) -> np.ndarray:
        """θ clipped to its bounds."""
        margin = 1e-9 * (self._high - self._low)
        return np.clip(theta, self._low + margin, self._high - margin)

    def _residuals(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _residuals(self._designs, theta, self._target, self._used)

    def _objective(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        r, slope = self._residuals(theta)
        return float(_huber(r).sum()), np.clip(r, -1, 1) @ slope

    def _finish(self, theta: np.ndarray) -> np.ndarray:
        found = least_squares(
            lambda t: self._residuals(t)[0],
            theta,
            jac=lambda t: self._residuals(t)[1],
            bounds=(self._low, self._high),
            loss="huber",
            x_scale="jac",
            ftol=1e-12,
            xtol=1e-12,
            gtol=1e-12,
            max_nfev=300,
        )
        return found.x if found.cost <= self._objective(theta)[0] else theta
