"""Which VAE may decode latents: the one whose digest they carry, by mean or by sample."""

from types import SimpleNamespace

import pytest

from data_sharding.errors import UserError
from data_sharding.format import codecs


@pytest.fixture(autouse=True)
def vae(monkeypatch):
    made = SimpleNamespace(weights="w" * 64, channels=4, digest_as={"mean": "1" * 64, "sample": "2" * 64}.__getitem__)
    monkeypatch.setattr(codecs, "_sd_vae", lambda folder, latent: made)
    return made


@pytest.mark.parametrize("digest", [None, "published sd-vae-ft-ema latents", "1" * 64, "2" * 64])
def test_latents_of_the_vae_or_of_none_that_is_known(digest, vae):
    assert codecs.decoding_vae("FOLDER", digest) is vae


def test_latents_of_another_vae_are_refused():
    with pytest.raises(
        UserError, match=r"the VAE in FOLDER \(w{16}\) is not the one .* \(codec 3{16}\): give the folder"
    ):
        codecs.decoding_vae("FOLDER", "3" * 64)


def test_latents_of_other_channels_are_refused(vae):
    """The published ones come without a digest of their VAE."""
    record = {"name": "sd-vae", "digest": codecs.PUBLISHED, "scale": 0.18215}
    assert codecs.codec_of(record, "FOLDER") is vae
    vae.channels = 16
    with pytest.raises(UserError, match="holds latents of 4 channels, and the VAE in FOLDER has 16: give the one that"):
        codecs.codec_of(record, "FOLDER")
