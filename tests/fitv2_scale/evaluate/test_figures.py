"""FID, IS, precision and recall against closed forms, scipy and brute force; and the feature network."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import nn

from data_sharding.errors import UserError
from fitv2_scale.evaluate.feature_network import FeatureNetwork
from fitv2_scale.evaluate.features import Features, npz_bytes, read_npz
from fitv2_scale.evaluate.fid import Gaussian, frechet_distance, inception_score
from fitv2_scale.evaluate.precision_recall import precision_recall
from fitv2_scale.evaluate.results import measure
from tests.support.feature_networks import CLASSES, POOL, ByFlags, PoolAlone, Tiny, save_network

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


def brute_force(made: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float]:
    """By the definition, one pair at a time."""

    def radius(x, i):
        return sorted(((x[i] - y) ** 2).sum() for j, y in enumerate(x) if j != i)[k - 1]

    def share(x, centres):
        radii = [radius(centres, i) for i in range(len(centres))]
        inside = [any(((y - c) ** 2).sum() <= r for c, r in zip(centres, radii, strict=True)) for y in x]
        return sum(inside) / len(x)

    return share(made, real), share(real, made)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 3), block=st.sampled_from([1, 7, 64]))
def test_precision_and_recall_are_those_of_brute_force(seed, k, block):
    made, real = rng(seed).normal(size=(23, 3)) + 100, 1.5 * rng(seed + 1).normal(size=(31, 3)) + 100.5
    assert precision_recall(made, real, k, block=block) == brute_force(made, real, k)


def test_precision_and_recall_know_what_is_missing():
    left, right = rng(0).normal(size=(200, 4)), rng(1).normal(size=(200, 4)) + 50
    both = np.concatenate((left, right))
    assert precision_recall(left, left) == (1.0, 1.0)
    assert precision_recall(left, right) == (0.0, 0.0)
    precision, recall = precision_recall(left + 1e-3, both)
    assert precision > 0.99 and recall == pytest.approx(0.5, abs=0.01)


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
        (lambda: inception_score(GOOD), "probabilities must not be negative"),
        (lambda: precision_recall(GOOD[:3], GOOD), "3 made images are too few for 3 neighbours: give at least 4"),
        (lambda: precision_recall(GOOD[:, :5], GOOD), "made images have 5 features and real ones 6"),
        (lambda: precision_recall(GOOD * np.inf, GOOD), "made features: row 0 holds NaN or infinity"),
        (lambda: Gaussian(GOOD[0], GOOD[:6]).check("f.npz"), "f.npz: its covariance is not symmetric"),
        (lambda: Gaussian(GOOD[0], GOOD[:5]).check("f.npz"), "no covariance of"),
        (lambda: Gaussian(GOOD[0] * np.nan, np.eye(6)).check("f.npz"), "f.npz: its statistics hold NaN or infinity"),
        (lambda: features_file(pool=GOOD, spatial=GOOD[:5]), "spatial has 5 rows and pool 40"),
        (lambda: features_file(pool=GOOD.astype(int)), "file.npz: pool is int64"),
        (lambda: read_npz(b"PK\x03\x04 nothing"), "no whole .npz of plain arrays"),
        (lambda: read_npz(npz_bytes({"pool": np.array([print])})), "no whole .npz of plain arrays"),
    ],
)
def test_what_cannot_be_measured(act, sentence):
    with pytest.raises(UserError, match=sentence):
        act()


PICTURES = rng(0).integers(0, 256, (60, 32, 48, 3), np.uint8)  # more than one batch


def test_a_network_that_gives_all(tmp_path):
    file, digest = save_network(Tiny(), tmp_path)
    found = FeatureNetwork.load(file, digest.upper())(PICTURES)
    expected = Tiny()(torch.from_numpy(PICTURES).permute(0, 3, 1, 2))
    np.testing.assert_allclose(found.pool, expected["pool"].detach(), atol=1e-6)
    np.testing.assert_allclose(found.probabilities, expected["logits"].detach().softmax(1), atol=1e-6)
    channels_last = expected["spatial"].detach().permute(0, 2, 3, 1)
    np.testing.assert_allclose(found.spatial.reshape(60, 2, 2, 3), channels_last, atol=1e-6)
    assert found.pool.shape == (60, POOL) and found.probabilities.shape == (60, CLASSES)


def test_networks_that_give_less(tmp_path):
    alone = FeatureNetwork.load(*save_network(PoolAlone(), tmp_path))(PICTURES)
    assert list(alone.arrays()) == ["pool"] and alone.pool.shape == (60, 3)
    flags = FeatureNetwork.load(*save_network(ByFlags(), tmp_path))(PICTURES)
    assert list(flags.arrays()) == ["pool", "probabilities"]
    np.testing.assert_allclose(flags.pool, PICTURES.mean((1, 2)) / 255, rtol=1e-5)
    np.testing.assert_allclose(flags.probabilities.sum(1), 1, rtol=1e-6)


class Trap(nn.Module):
    """Would leave a trace if it was loaded, as the hooks of a module of a stranger might."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((1, 2, 3))


def test_networks_that_are_refused(tmp_path, monkeypatch):
    file, digest = save_network(Trap(), tmp_path)
    loaded = []
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: loaded.append(a))
    with pytest.raises(UserError, match="is a program: give its digest as --network-sha256"):
        FeatureNetwork.load(file, None)
    with pytest.raises(UserError, match=f"has the sha256 {digest}, not 00.*is not loaded"):
        FeatureNetwork.load(file, "00" * 32)
    assert not loaded
    monkeypatch.undo()
    with pytest.raises(UserError, match="pool is float32"):  # not a row an image
        FeatureNetwork.load(file, digest)(PICTURES)
    with pytest.raises(UserError, match="cannot read the network"):
        FeatureNetwork.load(str(tmp_path / "none.pt"), digest)
    with pytest.raises(UserError, match="the network does not take uint8"):
        FeatureNetwork.load(*save_network(Tiny(), tmp_path))(PICTURES[:, :2])


def test_no_torchscript(tmp_path):
    import hashlib

    file = tmp_path / "network.pt"
    file.write_bytes(b"no network")
    with pytest.raises(UserError, match="is no TorchScript"):
        FeatureNetwork.load(str(file), hashlib.sha256(b"no network").hexdigest())


def test_figures_that_cannot_be_had_are_none(tmp_path):
    from fitv2_scale.evaluate.reference_statistics import Reference

    real = Features(GOOD, GOOD, None)
    without = measure(Features(GOOD + 1), Reference("r", REFERENCE, Gaussian.of(real.spatial), None, None))
    assert without["fid"] == pytest.approx(6, rel=1e-6)  # a shift by 1 in 6 features
    assert [without[name] for name in ("sfid", "is", "precision", "recall")] == [None] * 4
