"""The feature network: what it gives, and which files are refused."""

import numpy as np
import pytest
import torch
from torch import nn

from data_sharding.errors import UserError
from fitv2_scale.evaluate.feature_network import FeatureNetwork
from tests.support.feature_networks import CLASSES, POOL, ByFlags, PoolAlone, Tiny, save_network

PICTURES = np.random.default_rng(0).integers(0, 256, (60, 32, 48, 3), np.uint8)  # more than one batch


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
    with pytest.raises(UserError, match="the network does not accept uint8"):
        FeatureNetwork.load(*save_network(Tiny(), tmp_path))(PICTURES[:, :2])


def test_no_torchscript(tmp_path):
    import hashlib

    file = tmp_path / "network.pt"
    file.write_bytes(b"no network")
    with pytest.raises(UserError, match="is not TorchScript"):
        FeatureNetwork.load(str(file), hashlib.sha256(b"no network").hexdigest())
