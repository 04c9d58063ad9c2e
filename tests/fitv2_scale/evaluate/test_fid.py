"""FID and IS against closed forms and scipy; and what cannot be measured."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from data_sharding.errors import UserError
from fitv2_scale.evaluate.features import Features, npz_bytes, read_npz
from fitv2_scale.evaluate.fid import Gaussian, frechet_distance, inception_score
from fitv2_scale.evaluate.precision_recall import precision_recall
from fitv2_scale.evaluate.results import measure

rng = np.random.default_rng


def features(seed: int, count: int, size: int, shift: float = 0.0) -> np.ndarray:
    """float32 (count, size), correlated, with scales over two orders of magnitude."""
    draw = rng(seed)
    mixing = draw.normal(size=(size, size)) * np.geomspace(0.1, 10, size)
    return (draw.normal(size=(count, size)) @ mixing + shift).astype(np.float32)


def by_scipy(a: Gaussian, b: Gaussian) -> float:
    """The formula as ADM's evaluator computes it."""
    root = sqrtm(a.covariance @ b.covariance).real
    shift = a.mean - b.mean
    return shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root)


def test_covariance_is_numpys():
    x = features(0, 5000, 9)  # more than one block
    found, wide = Gaussian.of(x), x.astype(np.float64)
    np.testing.assert_allclose(found.mean, wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(wide, rowvar=False), rtol=1e-10, atol=1e-12)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(2, 24), shift=st.floats(-2, 2))
def test_fid_is_scipys(seed, size, shift):
    a, b = Gaussian.of(features(seed, 400, size)), Gaussian.of(features(seed + 1, 300, size, shift))
    expected = by_scipy(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


@pytest.mark.parametrize("size", [3, 64])
def test_fid_of_known_gaussians(size):
    """Diagonal covariances commute: |m|^2 + sum (sqrt(p) - sqrt(q))^2."""
    p, q, m = rng(1).uniform(0.1, 4, size), rng(2).uniform(0.1, 4, size), rng(3).normal(size=size)
    rotation = np.linalg.qr(rng(4).normal(size=(size, size)))[0]
    a = Gaussian(rotation @ m, rotation * p @ rotation.T)
    b = Gaussian(np.zeros(size), rotation * q @ rotation.T)
    assert frechet_distance(a, b) == pytest.approx(m @ m + ((p**0.5 - q**0.5) ** 2).sum(), rel=1e-12)


def test_fid_of_singular_covariances():
    """Where scipy's root is not to be trusted: rank 2 of 6, and constant features."""
    factor, m = rng(0).normal(size=(6, 2)), rng(1).normal(size=6)
    a = Gaussian(np.zeros(6), factor @ factor.T)
    b = Gaussian(m, 4 * factor @ factor.T)
    assert frechet_distance(a, b) == pytest.approx(m @ m + np.trace(factor @ factor.T), rel=1e-12)
    still = Gaussian(np.zeros(6), np.zeros((6, 6)))
    assert frechet_distance(still, a) == pytest.approx(np.trace(a.covariance), rel=1e-12)


def test_a_set_and_itself_and_its_halves():
    x = features(5, 4000, 32)
    whole, first, second = (Gaussian.of(part) for part in (x, x[::2], x[1::2]))
    assert frechet_distance(whole, whole) < 1e-3
    halves, spread = frechet_distance(first, second), np.trace(whole.covariance)
    assert halves < 0.01 * spread
    assert halves == pytest.approx(by_scipy(first, second), abs=1e-6, rel=1e-6)


def test_inception_score():
    sharp = np.eye(8, dtype=np.float32)[np.arange(800) % 8]
    assert inception_score(sharp) == pytest.approx(8, rel=1e-12)  # of K classes, each certain: K
    assert inception_score(np.full((50, 8), 1 / 8, np.float32)) == pytest.approx(1, rel=1e-12)
    p = rng(0).dirichlet(np.ones(5), 300)
    kl = (p * (np.log(p) - np.log(p.mean(0)))).sum(1)
    assert inception_score(p) == pytest.approx(np.exp(kl.mean()), rel=1e-12)
    in_two = (np.exp(_kl(p[:200]).mean()) + np.exp(_kl(p[200:]).mean())) / 2
    assert inception_score(p, split=200) == pytest.approx(in_two, rel=1e-12)


def _kl(p: np.ndarray) -> np.ndarray:
    return (p * (np.log(p) - np.log(p.mean(0)))).sum(1)


def features_file(**arrays) -> Features:
    return Features.from_arrays(read_npz(npz_bytes(arrays)), "file.npz")


GOOD = rng(0).normal(size=(40, 6)).astype(np.float32)
REFERENCE = Gaussian.of(GOOD)


@pytest.mark.parametrize(
    "act,sentence",
    [
        (lambda: Gaussian.of(GOOD[:6]), "6 images are too few for a covariance of 6 features: give at least 7"),
        (lambda: Gaussian.of(np.where(GOOD > 2, np.nan, GOOD)), "features: row [0-9]+ holds NaN or infinity"),
        (lambda: frechet_distance(Gaussian.of(GOOD[:, :5]), REFERENCE), "size 5 cannot be .* reference of size 6"),
        (lambda: inception_score(np.array([[0.5, 0.5], [0.4, 0.5]])), "probabilities must .* sum to 1"),
        (lambda: inception_score(np.array([[0.5, 0.5], [1.01, -0.01]])), "probabilities must not be negative"),
        (lambda: precision_recall(GOOD[:3], GOOD), "3 generated images are too few for 3 neighbours: give at least 4"),
        (lambda: precision_recall(GOOD[:, :5], GOOD), "generated images have 5 features and real ones 6"),
        (lambda: precision_recall(GOOD * np.inf, GOOD), "generated features: row 0 holds NaN or infinity"),
        (lambda: Gaussian(GOOD[0], GOOD[:6]).check("f.npz"), "f.npz: its covariance is not symmetric"),
        (lambda: Gaussian(GOOD[0], GOOD[:5]).check("f.npz"), "no covariance of"),
        (lambda: Gaussian(GOOD[0] * np.nan, np.eye(6)).check("f.npz"), "f.npz: its statistics hold NaN or infinity"),
        (lambda: Gaussian(GOOD[0], np.eye(6) * 1e300).check("f.npz"), "or numbers of 1e\\+100 and more: get the file"),
        (lambda: Gaussian(GOOD[0], np.diag([1.0, 1, 1, 1, 1, -0.5])).check("f.npz"), "the variance is -0.5, but none"),
        (
            lambda: Gaussian(np.zeros(2), np.array([[1.0, 2], [2, 1]])).check("f.npz"),
            "the variance is -1, but none",
        ),
        (lambda: Gaussian(np.float64(0), np.eye(1)).check("f.npz"), "a mean of shape .. has no covariance"),
        (lambda: features_file(pool=GOOD, spatial=GOOD[:5]), "spatial has 5 rows, but pool has 40"),
        (lambda: features_file(pool=GOOD.astype(int)), "file.npz: pool is int64"),
        (lambda: read_npz(b"PK\x03\x04 nothing"), "not an intact .npz of plain arrays"),
        (lambda: read_npz(npz_bytes({"pool": np.array([print])})), "not an intact .npz of plain arrays"),
    ],
)
def test_what_cannot_be_measured(act, sentence):
    with pytest.raises(UserError, match=sentence):
        act()


def test_metrics_without_their_inputs_are_none(tmp_path):
    from fitv2_scale.evaluate.reference_statistics import Reference

    real = Features(GOOD, GOOD, None)
    without = measure(Features(GOOD + 1), Reference("r", REFERENCE, Gaussian.of(real.spatial), None, None))
    assert without["fid"] == pytest.approx(6, rel=1e-6)  # a shift by 1 in 6 features
    assert [without[name] for name in ("sfid", "is", "precision", "recall")] == [None] * 4


@pytest.mark.parametrize("size", [6, 300])
def test_rounding_makes_no_negative_variance(size):
    """A covariance of low rank, rounded to float32 as some published files are, has eigenvalues below zero."""
    factor = rng(0).normal(size=(size, 2))
    covariance = (factor @ factor.T).astype(np.float32).astype(np.float64)
    assert np.linalg.eigvalsh(covariance)[0] < 0
    Gaussian(np.zeros(size), covariance).check("f.npz")


@pytest.mark.filterwarnings("error")
def test_large_statistics_in_float32_are_checked_without_overflow():
    Gaussian(GOOD[0], np.eye(6, dtype=np.float32) * np.float32(3e38)).check("f.npz")
    with pytest.raises(UserError, match="its statistics hold NaN or infinity"):
        Gaussian(GOOD[0], np.full((6, 6), np.inf, np.float32)).check("f.npz")
