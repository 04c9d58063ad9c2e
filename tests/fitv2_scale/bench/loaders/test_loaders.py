"""Every loader that is compared gives the same images."""

import numpy as np
import pytest

from fitv2_scale.bench.latents import MAX_TOKENS, make_samples, write_latents
from fitv2_scale.bench.loaders import OURS, PEERS, LoaderConfig, import_loader, missing_package

IMAGES = 96


@pytest.fixture(scope="module", params=[OURS, *PEERS])
def loader(request) -> str:
    if package := missing_package(request.param):
        pytest.skip(f"{package} is not installed (the extra `peers`)")
    return request.param


@pytest.fixture(scope="module")
def folder(loader, tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    write_latents(root, IMAGES, [loader])
    return root


@pytest.fixture(scope="module")
def samples():
    return {sample.id: sample for sample in make_samples(IMAGES)}


def config_of(loader, folder, tmp_path, views) -> LoaderConfig:
    # Batches that IMAGES divides by, and workers none: pytest's process is not to be forked.
    return LoaderConfig(str(folder / loader), str(tmp_path), 32, 0, views, MAX_TOKENS)


def test_every_image_comes_once_an_epoch(loader, folder, samples, tmp_path):
    epochs = import_loader(loader).epochs(config_of(loader, folder, tmp_path, "resize"))
    orders, tokens = [], sum(sample.size[0][0] * sample.size[0][1] for sample in samples.values())
    for _ in range(2):
        batches = list(next(epochs))
        orders.append([int(i) for batch in batches for i in batch.sample_id])
        assert sum(batch.tokens for batch in batches) == tokens
        assert sorted(orders[-1]) == sorted(samples)
    epochs.close()
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_mixed_views_are_mixed(loader, folder, samples, tmp_path):
    """Between all crops and none."""
    epochs = import_loader(loader).epochs(config_of(loader, folder, tmp_path, "mixed"))
    (tokens,) = [sum(batch.tokens for batch in next(epochs))]
    epochs.close()
    sizes = np.array([sample.size for sample in samples.values()]).prod(-1)  # (image, view)
    crops = np.where(sizes[:, 1] > 0, sizes[:, 1], sizes[:, 0])
    low, high = sorted((sizes[:, 0].sum(), crops.sum()))
    assert low < tokens < high


@pytest.mark.parametrize("loader", PEERS, indirect=True)  # our packs are compared in test_stream
def test_a_padded_row_is_a_flip_of_its_image(loader, folder, samples, tmp_path):
    epochs = import_loader(loader).epochs(config_of(loader, folder, tmp_path, "resize"))
    flips = set()
    for batch in next(epochs):
        for row, sample_id in zip(batch.latents.numpy(), batch.sample_id.tolist(), strict=True):
            views = samples[sample_id].views["resize"].reshape(2, -1, 16).astype(np.float32)
            (flip,) = [i for i in range(2) if np.array_equal(row[: views.shape[1]], views[i])]
            flips.add(flip)
            assert not row[views.shape[1] :].any()
    epochs.close()
    assert flips == {0, 1}
