"""FID and sFID, the distance between two sets of features, and the inception score of one set; in float64.

The conventions are those of ADM's evaluator (guided-diffusion, evaluations/evaluator.py): covariances divide by N - 1,
and the inception score is the mean over splits of 5,000 images in their order.
"""

from dataclasses import dataclass

import numpy as np

from data_sharding.errors import UserError

IS_SPLIT = 5000  # images
_BLOCK = 4096  # images turned into float64 at once
_MOST = 1e100  # of a mean or a covariance: far above any feature's, and products of them are finite
_ROUNDING = 1e-5  # of the largest variance: how far below zero float32 leaves the least of 2,048, with a wide margin


@dataclass(frozen=True, eq=False)
class Gaussian:
    """``mean`` float64 (D,), ``covariance`` float64 (D, D)."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, name: str = "features") -> "Gaussian":
        """Mean and covariance of features (N, D), with N > D, so that the covariance has an inverse.

        Raises:
            UserError: a feature is not finite, or there are too few images.
        """
        count, size = features.shape
        check_finite(features, name)
        if count <= size:
            raise UserError(
                f"{count} images are too few for a covariance of {size} {name}: give at least {size + 1}, better 50,000"
            )
        blocks = [features[at : at + _BLOCK] for at in range(0, count, _BLOCK)]
        mean = sum(block.sum(0, dtype=np.float64) for block in blocks) / count
        covariance = np.zeros((size, size))
        for block in blocks:
            centred = block - mean
            covariance += centred.T @ centred
        return cls(mean, covariance / (count - 1))

    def check(self, name: str) -> None:
        """Raises UserError unless it is a mean and a covariance."""
        size = self.mean.shape[0] if self.mean.ndim == 1 else 0
        if not size or self.covariance.shape != (size, size):
            raise UserError(f"{name}: a mean of shape {self.mean.shape} has no covariance of {self.covariance.shape}")
        mean, covariance = self.mean.astype(np.float64), self.covariance.astype(np.float64)  # sums of float32 overflow
        if not ((abs(mean) < _MOST).all() and (abs(covariance) < _MOST).all()):
            raise UserError(
                f"{name}: its statistics hold NaN or infinity, or numbers of {_MOST:.0e} and more: get the file again, "
                "or compute it again"
            )
        if not np.allclose(covariance, covariance.T, rtol=1e-5, atol=1e-6 * abs(covariance).max()):
            raise UserError(f"{name}: its covariance is not symmetric: get the file again")
        variances = np.linalg.eigvalsh((covariance + covariance.T) / 2)
        if variances[0] < -_ROUNDING * variances[-1] or covariance.diagonal().min() < 0:
            raise UserError(
                f"{name}: its covariance is none: along one direction the variance is {variances[0]:.3g}, but none can "
                "be negative: get the file again, or compute it again"
            )


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al., arXiv 1706.08500).

    With A = X X' and B = Y Y', the trace of the root is the sum of the singular values of X' Y. Unlike a matrix square
    root of A B, which ADM uses, this needs no offset if a covariance is singular, and stays real.

    Raises:
        UserError: features of different sizes.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"features of size {a.mean.size} cannot be compared with a reference of size {b.mean.size}: use the "
            "network of the reference"
        )
    shift = a.mean - b.mean
    cross = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(distance), 0.0)  # rounding may give slightly less for equal statistics


def inception_score(probabilities: np.ndarray, split: int = IS_SPLIT) -> float:
    """The mean over splits of exp E[KL(p(y|x) || p(y))] of class probabilities (N, K) (arXiv 1606.03498).

    Raises:
        UserError: rows that are not probabilities.
    """
    check_finite(probabilities, "probabilities")
    scores = []
    for at in range(0, len(probabilities), split):
        part = probabilities[at : at + split].astype(np.float64)
        if part.min() < 0 or not np.allclose(part.sum(1), 1, atol=1e-3):
            raise UserError("probabilities must not be negative and must sum to 1 per image: give softmax outputs")
        part = part / part.sum(1, keepdims=True)  # the sums were rounded to float32
        mean = part.mean(0)
        ratio = np.divide(part, mean, out=np.ones_like(part), where=part > 0)
        scores.append(np.exp((part * np.log(ratio)).sum(1).mean()))
    return float(np.mean(scores))


def check_finite(features: np.ndarray, name: str) -> None:
    """Raises UserError that names the first row with a NaN or an infinity."""
    for at in range(0, len(features), _BLOCK):
        bad = ~np.isfinite(features[at : at + _BLOCK]).all(1)
        if bad.any():
            raise UserError(
                f"{name}: row {at + int(bad.argmax())} holds NaN or infinity: check that image, or the network"
            )


def _factor(covariance: np.ndarray) -> np.ndarray:
    """X with X X' = ``covariance``."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * np.sqrt(values.clip(min=0))  # rounding leaves zeros a little below zero
