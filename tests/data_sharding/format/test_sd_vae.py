"""The codec sd-vae, on a small random VAE that the test saves to disk: against diffusers called by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_sharding.errors import UserError
from data_sharding.format import sd_vae as module
from data_sharding.format.codec import Draw
from data_sharding.format.codecs import get_codec
from data_sharding.format.sd_vae import load_vae
from data_sharding.rng import Purpose, words
from tests.support.small_vae import save_vae

diffusers = pytest.importorskip("diffusers")


def pixels(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def draws(count: int) -> list[Draw]:
    return [Draw(7 + i, i % 4) for i in range(count)]


def posterior(vae_folder: str, picture: np.ndarray):
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False).eval()
    x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        return vae.encode(x).latent_dist


def test_the_mean_is_diffusers_mean_times_the_scale(vae_folder):
    codec = get_codec("sd-vae", vae_folder)
    batch = pixels(3, 48, 32)
    latents = codec.encode(batch, draws(3))
    assert latents.shape == (3, 4, 6, 4) and latents.dtype == np.float32
    for picture, latent in zip(batch, latents, strict=True):
        expected = posterior(vae_folder, picture).mean[0].numpy() * 0.18215
        np.testing.assert_allclose(latent, expected, rtol=1e-4, atol=1e-6)


def test_a_sample_has_the_keyed_noise_of_its_image_and_picture(vae_folder):
    codec = get_codec("sd-vae", vae_folder, "sample")
    batch = pixels(4, 32, 32)
    latents = codec.encode(batch, draws(4))
    for picture, draw, latent in zip(batch, draws(4), latents, strict=True):
        u = (words(0, Purpose.POSTERIOR, draw.picture, draw.id, np.arange(4 * 4 * 4)) + 0.5) / 2**32
        radius, angle = np.sqrt(-2 * np.log(u[0::2])), 2 * np.pi * u[1::2]
        noise = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(4, 4, 4)
        dist = posterior(vae_folder, picture)
        expected = (dist.mean[0].numpy() + dist.std[0].numpy() * noise) * 0.18215
        np.testing.assert_allclose(latent, expected, rtol=1e-4, atol=1e-5)
    alone = codec.encode(batch[2:3], draws(4)[2:3])[0]
    np.testing.assert_allclose(alone, latents[2], rtol=1e-4, atol=1e-6)
    same = codec.encode(np.repeat(batch[:1], 3, 0), [Draw(7, 0), Draw(7, 1), Draw(8, 0)])
    assert np.abs(same[0] - same[1]).max() > 0.01 and np.abs(same[0] - same[2]).max() > 0.01


def test_the_noise_is_standard_normal():
    noise = module._noise([Draw(i, 0) for i in range(64)], (4, 16, 16))
    assert noise.dtype == np.float32 and abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.1


def test_decoding_is_clamp_of_127_5_x_plus_128(vae_folder):
    codec = get_codec("sd-vae", vae_folder)
    latent = np.random.default_rng(0).standard_normal((4, 6, 8)).astype(np.float32) * 3
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        picture = vae.decode(torch.from_numpy(latent)[None] / 0.18215).sample[0].numpy()
    expected = np.clip(127.5 * picture + 128, 0, 255).transpose(1, 2, 0)
    decoded = codec.decode(latent)
    assert decoded.shape == (48, 64, 3) and decoded.dtype == np.uint8
    assert np.abs(decoded - np.floor(expected)).max() <= 1


def test_the_digest_follows_weights_and_arithmetic_not_files(vae_folder, tmp_path):
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False)
    vae.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert list((tmp_path / "bin").glob("*.bin"))
    weights = load_vae(vae_folder, "mean").weights
    assert load_vae(str(tmp_path / "bin"), "mean").weights == weights
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1e-6
    vae.save_pretrained(tmp_path / "touched")
    assert load_vae(str(tmp_path / "touched"), "mean").weights != weights
    assert load_vae(save_vae(tmp_path / "scaled", scaling_factor=0.2), "mean").weights != weights


@pytest.mark.parametrize(
    "error,reason", [(MemoryError(), "MemoryError"), (ValueError("\nbad header\nat 7"), "bad header")]
)
def test_why_a_vae_cannot_be_loaded_is_told(vae_folder, monkeypatch, error, reason):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", fail)
    with pytest.raises(UserError) as said:
        load_vae(vae_folder, "mean")
    assert str(said.value) == f"the VAE in {vae_folder} cannot be loaded: {reason}"


def test_unusable_folders_are_one_sentence_each(tmp_path, vae_folder, monkeypatch):
    with pytest.raises(UserError, match="give --vae FOLDER"):
        get_codec("sd-vae")
    with pytest.raises(UserError, match="dct has neither weights"):
        get_codec("dct", vae_folder)
    with pytest.raises(UserError, match="holds no VAE"):
        get_codec("sd-vae", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(UserError, match="holds a UNet2DModel"):
        get_codec("sd-vae", str(tmp_path))
    for name, changes, match in (
        ("levels", {"block_out_channels": (4, 4, 4)}, "has 4 channels at 1/4"),
        ("shift", {"shift_factor": 0.1}, "has 4 shifted channels"),
    ):
        with pytest.raises(UserError, match=match):
            get_codec("sd-vae", save_vae(tmp_path / name, **changes))
    cut = Path(save_vae(tmp_path / "cut")) / "diffusion_pytorch_model.safetensors"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        get_codec("sd-vae", str(tmp_path / "cut"))
    from safetensors.numpy import load, save

    tensors = load(whole)
    del tensors["encoder.conv_in.bias"]
    cut.write_bytes(save(tensors, {"format": "pt"}))
    with pytest.raises(UserError, match="lack 1 tensors, such as encoder.conv_in.bias"):
        get_codec("sd-vae", str(tmp_path / "cut"))
    load_vae.cache_clear()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"needs the package diffusers: pip install -e '\.\[vae\]'"):
        get_codec("sd-vae", vae_folder)


@pytest.mark.parametrize(
    "environment,current,expected",
    [
        ({"LOCAL_RANK": "3"}, None, 3),  # as torchrun sets it
        ({"LOCAL_RANK": "0"}, 5, 5),  # joined: whatever chose the device of the rank
        ({"FITV2_WORKER": "11"}, None, 3),  # of a pool of writers
        ({"FITV2_WORKER": "2", "SLURM_LOCALID": "1"}, None, 3),
        ({}, None, 0),
    ],
)
def test_the_vae_is_on_the_gpu_of_its_process(vae_folder, monkeypatch, environment, current, expected):
    """Of eight GPUs, which are not there."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "FITV2_WORKER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: current is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    asked = []
    monkeypatch.setattr(diffusers.AutoencoderKL, "to", lambda self, device: asked.append(device) or self)
    load_vae.cache_clear()
    load_vae(vae_folder, "mean")
    load_vae.cache_clear()
    assert asked == [torch.device("cuda", expected)]


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits_each_time_and_nearly_those_of_a_cpu(vae_folder, monkeypatch):
    batch = pixels(8, 64, 64)
    first, second = (load_vae(vae_folder, "sample").encode(batch, draws(8)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    load_vae.cache_clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    np.testing.assert_allclose(load_vae(vae_folder, "sample").encode(batch, draws(8)), first, rtol=1e-3, atol=1e-4)
    load_vae.cache_clear()
