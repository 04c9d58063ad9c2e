"""References: our own, those that others made, halves, datasets."""

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from data_sharding.errors import UserError
from fitv2_scale.evaluate.evaluate import EvaluationOptions, evaluate_images, is_network
from fitv2_scale.evaluate.feature_network import FeatureNetwork
from fitv2_scale.evaluate.features import read_npz
from fitv2_scale.evaluate.image_sets import open_image_set
from fitv2_scale.evaluate.reference_statistics import (
    check_reference,
    open_reference,
    reference_for,
    reference_identity,
)
from tests.support.feature_networks import POOL

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "change,sentence",
    [
        ({}, None),
        ({"sigma": -np.eye(POOL)}, "its covariance is none"),
        ({"mu_s": np.zeros(3)}, "lacks sigma_s"),
        ({"mu": np.zeros(5)}, f"the network gives {POOL} features, but .* has 5"),
        ({"network": np.array("0" * 64)}, "is of the network 0000000000000000, but yours is"),
    ],
)
def test_a_reference_is_refused_before_images_are_made_for_it(feature_network, tmp_path, change, sentence):
    network = FeatureNetwork.load(feature_network["network"], feature_network["network_sha256"])
    np.savez(tmp_path / "r.npz", **{"mu": np.zeros(POOL), "sigma": np.eye(POOL)} | change)
    with pytest.raises(UserError, match=sentence) if sentence else nullcontext():
        check_reference(str(tmp_path / "r.npz"), network, POOL)


def test_statistics_are_in_adms_format(photographs, feature_network, reference):
    """As its evaluator reads them: mu and sigma of all, the spatial ones too, and pictures."""
    arrays = read_npz(reference)
    assert {n: a.shape for n, a in arrays.items() if n != "network"} == {
        "mu": (POOL,), "sigma": (POOL, POOL), "mu_s": (12,), "sigma_s": (12, 12),
        "arr_0": (80, 32, 48, 3), "pool": (80, POOL),
    }  # fmt: skip
    assert arrays["arr_0"].dtype == np.uint8 and arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
    again = evaluate_images(photographs, "32x48", EvaluationOptions(**feature_network, reference=reference), None, CPU)
    assert again["fid"] < 1e-3 and again["sfid"] < 1e-3 and (again["precision"], again["recall"]) == (1.0, 1.0)


def test_a_reference_that_others_made(photographs, feature_network, reference, tmp_path):
    """Without our extra arrays: the features for precision and recall are computed from its pictures. And a batch of
    pictures alone, as `fitv2 sample --npz` writes it, is a reference too."""
    arrays = read_npz(reference)
    published, batch = str(tmp_path / "published.npz"), str(tmp_path / "batch.npz")
    np.savez(published, **{name: arrays[name] for name in ("mu", "sigma", "mu_s", "sigma_s", "arr_0")})
    np.savez(batch, arr_0=arrays["arr_0"])
    ours = evaluate_images(photographs, "32x32", EvaluationOptions(**feature_network, reference=reference), None, CPU)
    for other in (published, batch):
        found = evaluate_images(photographs, "32x32", EvaluationOptions(**feature_network, reference=other), None, CPU)
        assert [found[n] for n in ("fid", "sfid", "is")] == pytest.approx([ours[n] for n in ("fid", "sfid", "is")])
        assert (found["precision"], found["recall"]) == (ours["precision"], ours["recall"])
    assert ours["fid"] > 1e-4


def test_two_halves(photographs, feature_network, reference, tmp_path):
    """Of precomputed features, against the formula with scipy's root."""
    pool = read_npz(reference)["pool"]
    first, second = str(tmp_path / "first.npz"), str(tmp_path / "second.npz")
    np.savez(first, pool=pool[::2])
    np.savez(second, pool=pool[1::2])
    found = evaluate_images(first, None, EvaluationOptions(reference=second), None, CPU)
    a, b = (np.cov(half.astype(np.float64), rowvar=False) for half in (pool[::2], pool[1::2]))
    shift = pool[::2].mean(0, dtype=np.float64) - pool[1::2].mean(0, dtype=np.float64)
    expected = shift @ shift + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert found["fid"] == pytest.approx(expected, abs=1e-6) and found["fid"] < 0.1 * np.trace(a)
    assert found["sfid"] is found["is"] is None and found["images"] == 40


def test_a_dataset_is_measured_as_decoded(dataset, photographs, feature_network):
    means = EvaluationOptions(**feature_network, reference=dataset, reference_images=100)
    assert evaluate_images(dataset, "32x48", means, None, CPU)["fid"] < 1e-3
    pictures = open_image_set(dataset, (48, 32), 100)
    assert pictures.count == 100 and {p.shape for p in pictures.read()} == {(48, 32, 3)}
    assert evaluate_images(photographs, "32x48", means, None, CPU)["fid"] > 1e-2  # others


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            lambda a: {"sigma": a["sigma"] - 2 * np.diag(np.diag(a["sigma"]))},
            "its covariance is none: along",
        ),
        (lambda a: {"sigma_s": -a["sigma_s"]}, "its covariance is none"),
        (lambda a: {"sigma": a["sigma"] * np.inf}, "its statistics hold NaN or infinity"),
        (lambda a: {"mu": a["mu"][None]}, "a mean of shape .* has no covariance"),
        (lambda a: {"mu": a["mu"].astype(str)}, "mu is <U.*, not real numbers"),
        (lambda a: {"sigma": a["sigma"] + 1j}, "sigma is complex128, not real numbers"),
        (lambda a: {"sigma_s": None}, "lacks sigma_s: it is not a reference"),
        (lambda a: {"pool": a["pool"][0]}, "pool is float32.*, not floats"),
    ],
)
def test_statistics_of_no_images_are_refused(reference, photographs, feature_network, tmp_path, change, sentence):
    arrays, bad = read_npz(reference), str(tmp_path / "bad.npz")
    np.savez(bad, **{name: array for name, array in {**arrays, **change(arrays)}.items() if array is not None})
    with pytest.raises(UserError, match=sentence):
        evaluate_images(photographs, "32x48", EvaluationOptions(**feature_network, reference=bad), None, CPU)


def test_a_pipe_is_no_reference(tmp_path):
    os.mkfifo(tmp_path / "ref.npz")
    url = str(tmp_path / "ref.npz")
    calls = (lambda: reference_identity(url, 5), lambda: open_reference(url, None, None, 5), lambda: is_network(url))
    for read in calls:
        with pytest.raises(UserError, match="ref.npz is a pipe: give a file"):
            read()


def test_the_size_of_a_reference_is_that_of_its_pictures(tmp_path):
    pictures = np.zeros((16, 8, 12, 3), np.uint8)
    np.savez(tmp_path / "r.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=pictures)
    assert open_reference(str(tmp_path / "r.npz"), None, None, 10).size == (8, 12)
    np.savez(tmp_path / "r.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert open_reference(str(tmp_path / "r.npz"), None, None, 10).size is None


def test_of_a_folder_of_references_the_one_for_the_size_of_the_images(
    photographs, feature_network, reference, tmp_path
):
    options = EvaluationOptions(**feature_network, reference=str(tmp_path))
    for name in ("32x48.npz", "64x64.npz"):
        shutil.copy(reference, tmp_path / name)
    found = evaluate_images(photographs, "32x48", options, None, CPU)
    assert found["reference"]["source"] == str(tmp_path / "32x48.npz") and found["fid"] < 1e-3
    with pytest.raises(UserError, match=r"has no 48x32\.npz: create it"):
        evaluate_images(photographs, "48x32", options, None, CPU)
    np.savez(tmp_path / "features", pool=read_npz(reference)["pool"])
    with pytest.raises(UserError, match="has a reference for each size: give the images' as --size"):
        evaluate_images(str(tmp_path / "features.npz"), None, options, None, CPU)
    assert evaluate_images(str(tmp_path / "features.npz"), "32x48", options, None, CPU)["fid"] < 1e-3


@pytest.mark.parametrize("name", ["index.npz", "mix.npz", "4x4.npz.bak", "ax4.npz"])
def test_photographs_with_another_npz_beside_them_are_no_folder_of_references(tmp_path, name):
    Path(tmp_path, name).touch()
    assert reference_for(str(tmp_path), "32x48") == str(tmp_path)


def test_what_else_lies_in_the_folders_is_counted(photographs, feature_network, tmp_path):
    photos, folder = str(tmp_path / "photos"), str(tmp_path / "real")
    for copy in (photos, folder):
        shutil.copytree(photographs, copy)
    for i in range(3):
        Path(photos, f"{i}.HEIC").touch()
    Path(photos, ".git").mkdir()
    Path(folder, "labels.txt").touch()
    options = EvaluationOptions(**feature_network, reference=folder)
    found = evaluate_images(photos, "32x48", options, None, CPU)
    assert sum(found["seen"].values()) == 83 and found["seen"][".heic"] == 3
    assert found["left_aside"] == {".heic": 3, "folder .git": 1}
    assert sum(found["reference"]["seen"].values()) == 81 and found["reference"]["left_aside"] == {".txt": 1}
