"""The codec sd-vae, on a small random VAE that the test saves to disk: against diffusers called by hand."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_sharding.errors import UserError
from data_sharding.format import sd_vae as module
from data_sharding.format.codec import Draw
from data_sharding.format.codecs import codec_of, get_codec
from data_sharding.format.manifest import Manifest
from data_sharding.format.patches import patchify, unpatchify
from data_sharding.format.sd_vae import load_vae
from data_sharding.rng import Purpose, words
from data_sharding.stream.frames import read_frame
from data_sharding.verify import verify
from data_sharding.write.image_sources import open_folder
from data_sharding.write.images import write_dataset
from data_sharding.write.views import encode_views, load_rgb, views_of
from fitv2_scale.run.run import Run
from fitv2_scale.train.loop import train
from tests.support.ranks import run_ranks
from tests.support.repository import ROOT
from tests.support.tiny_runs import make_tiny
from tests.support.written_datasets import bytes_of, make_images

diffusers = pytest.importorskip("diffusers")

OPTIONS = {"codec": "sd-vae", "max_tokens": 16, "images_per_shard": 5, "progress": False}


def save_vae(folder: Path, seed: int = 0, **changes) -> str:
    """Four resolutions, as SD-VAE, with 4 channels instead of 128 to 512."""
    torch.manual_seed(seed)
    config = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "latent_channels": 4} | changes
    levels = len(config["block_out_channels"])
    config |= {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    diffusers.AutoencoderKL(**config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("images")
    make_images(root, 18)
    return str(root)


def pixels(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def draws(count: int) -> list[Draw]:
    return [Draw(7 + i, i % 4) for i in range(count)]


def posterior(folder: str, picture: np.ndarray):
    vae = diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        return vae.encode(x).latent_dist


def test_the_mean_is_diffusers_mean_times_the_scale(folder):
    codec = get_codec("sd-vae", folder)
    batch = pixels(3, 48, 32)
    latents = codec.encode(batch, draws(3))
    assert latents.shape == (3, 4, 6, 4) and latents.dtype == np.float32
    for picture, latent in zip(batch, latents, strict=True):
        expected = posterior(folder, picture).mean[0].numpy() * 0.18215
        np.testing.assert_allclose(latent, expected, rtol=1e-4, atol=1e-6)


def test_a_sample_has_the_keyed_noise_of_its_image_and_picture(folder):
    codec = get_codec("sd-vae", folder, "sample")
    batch = pixels(4, 32, 32)
    latents = codec.encode(batch, draws(4))
    for picture, draw, latent in zip(batch, draws(4), latents, strict=True):
        u = (words(0, Purpose.POSTERIOR, draw.picture, draw.id, np.arange(4 * 4 * 4)) + 0.5) / 2**32
        radius, angle = np.sqrt(-2 * np.log(u[0::2])), 2 * np.pi * u[1::2]
        noise = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(4, 4, 4)
        dist = posterior(folder, picture)
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


def test_decoding_is_clamp_of_127_5_x_plus_128(folder):
    codec = get_codec("sd-vae", folder)
    latent = np.random.default_rng(0).standard_normal((4, 6, 8)).astype(np.float32) * 3
    vae = diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        picture = vae.decode(torch.from_numpy(latent)[None] / 0.18215).sample[0].numpy()
    expected = np.clip(127.5 * picture + 128, 0, 255).transpose(1, 2, 0)
    decoded = codec.decode(latent)
    assert decoded.shape == (48, 64, 3) and decoded.dtype == np.uint8
    assert np.abs(decoded - np.floor(expected)).max() <= 1


@pytest.fixture(scope="module")
def written(images, folder, tmp_path_factory):
    dst = tmp_path_factory.mktemp("written") / "set"
    return dst, write_dataset(images, str(dst), workers=1, vae=folder, latent="sample", **OPTIONS)


def test_a_dataset_holds_the_latents_of_its_pictures(images, folder, written):
    """Both views, both flips, batched or one by one."""
    dst, report = written
    assert (report.images, report.skipped) == (18, 0) and verify(str(dst)).problems == ()
    entries = {entry.id: entry for entry in open_folder(images).entries}
    codec = get_codec("sd-vae", folder, "sample")
    manifest = Manifest.load(str(dst))
    crops = 0
    for sample in read_frame(manifest, 0):
        views = views_of(load_rgb(entries[sample.id].data.read()), 16)
        assert views.keys() == sample.views.keys()
        for place, view in enumerate(("resize", "crop")):
            if view not in views:
                continue
            crops += view == "crop"
            for flip, picture in enumerate((views[view], views[view][:, ::-1])):
                alone = codec.encode(picture[None], [Draw(sample.id, 2 * place + flip)])[0]
                np.testing.assert_allclose(sample.views[view][flip], patchify(alone), rtol=2e-3, atol=2e-3)
    assert crops > 0


def test_two_processes_write_the_same_bytes_as_one(images, folder, written, tmp_path):
    write_dataset(images, str(tmp_path / "set"), workers=2, vae=folder, latent="sample", **OPTIONS)
    assert bytes_of(tmp_path / "set") == bytes_of(written[0])


def test_the_manifest_names_weights_scale_and_kind_of_latent(images, folder, written, tmp_path):
    codec = Manifest.load(str(written[0])).header.codec
    assert codec["name"] == "sd-vae" and codec["scale"] == 0.18215 and codec["latent"] == "sample"
    assert codec["vae"] == load_vae(folder, "mean").weights
    assert codec["digest"] != get_codec("sd-vae", folder, "mean").digest
    with pytest.raises(UserError, match="was begun with another codec"):
        write_dataset(images, str(written[0]), vae=folder, latent="mean", **OPTIONS)
    other = save_vae(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was begun with another codec"):
        write_dataset(images, str(written[0]), vae=other, latent="sample", **OPTIONS)


def test_the_digest_follows_weights_and_arithmetic_not_files(folder, tmp_path):
    vae = diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    vae.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert list((tmp_path / "bin").glob("*.bin"))
    weights = load_vae(folder, "mean").weights
    assert load_vae(str(tmp_path / "bin"), "mean").weights == weights
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1e-6
    vae.save_pretrained(tmp_path / "touched")
    assert load_vae(str(tmp_path / "touched"), "mean").weights != weights
    assert load_vae(save_vae(tmp_path / "scaled", scaling_factor=0.2), "mean").weights != weights


def test_pictures_come_from_the_header_and_a_folder(folder, written, tmp_path):
    header = Manifest.load(str(written[0])).header
    codec = codec_of(header.codec, folder)
    latent = unpatchify(read_frame(Manifest.load(str(written[0])), 0)[0].views["resize"][0])
    assert Image.fromarray(codec.decode(latent)).size == (latent.shape[2] * 8, latent.shape[1] * 8)
    with pytest.raises(UserError, match="set sampling.vae to the folder"):
        codec_of(header.codec)
    other = save_vae(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was written with the VAE .*, and .* holds"):
        codec_of(header.codec, other)
    from data_sharding.write.import_latents import CODEC

    assert codec_of(CODEC, other).scale == 0.18215  # the published latents say no digest
    assert codec_of(get_codec("dct").record).name == "dct"


def test_pictures_of_one_size_are_encoded_together(folder, monkeypatch):
    calls = []

    class Spy:
        batch_pixels = 8 * 64 * 64

        def encode(self, pixels, draws):
            calls.append((pixels.shape[:3], draws))
            return np.zeros((len(pixels), 4, pixels.shape[1] // 8, pixels.shape[2] // 8), np.float32)

    pictures = {i: {"resize": pixels(1, 48, 64)[0], "crop": pixels(1, 64, 64)[0]} for i in range(6)}
    encoded = encode_views(pictures, Spy())
    assert [shape for shape, _ in calls] == [(10, 48, 64), (2, 48, 64), (8, 64, 64), (4, 64, 64)]
    assert calls[0][1][:3] == [(0, 0), (0, 1), (1, 0)] and calls[3][1] == [(4, 2), (4, 3), (5, 2), (5, 3)]
    assert encoded[5]["crop"].shape == (2, 4, 4, 16)


def test_flips_and_views_land_where_they_belong():
    """A codec that only writes down what it was given."""

    class Mark:
        batch_pixels = 1 << 20

        def encode(self, pixels, draws):
            marks = [draw.id * 10 + draw.picture for draw in draws]
            assert [p[0, 0, 0] < p[0, -1, 0] for p in pixels] == [draw.picture % 2 == 0 for draw in draws]
            return np.array(marks, np.float32)[:, None, None, None] * np.ones((1, 4, 8, 8), np.float32)

    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3))
    encoded = encode_views({3: {"resize": ramp, "crop": ramp}, 5: {"resize": ramp}}, Mark())
    assert encoded[3]["resize"][:, 0, 0, 0].tolist() == [30, 31] and encoded[3]["crop"][:, 0, 0, 0].tolist() == [32, 33]
    assert encoded[5]["resize"][:, 0, 0, 0].tolist() == [50, 51]


def test_folders_that_will_not_do_are_one_sentence_each(tmp_path, folder, monkeypatch):
    with pytest.raises(UserError, match="give --vae FOLDER"):
        get_codec("sd-vae")
    with pytest.raises(UserError, match="dct has neither weights"):
        get_codec("dct", folder)
    with pytest.raises(UserError, match="holds no VAE"):
        get_codec("sd-vae", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(UserError, match="holds a UNet2DModel"):
        get_codec("sd-vae", str(tmp_path))
    for name, changes, match in (
        ("channels", {"latent_channels": 16}, "has 16 channels at 1/8"),
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
    with pytest.raises(UserError, match=r"needs the package diffusers: pip install 'fitv2-scale\[vae\]'"):
        get_codec("sd-vae", folder)


def test_torch_is_imported_for_this_codec_alone(images, tmp_path):
    call = (
        "import sys\nfrom data_sharding.write.images import write_dataset\nimport data_sharding.write.import_latents\n"
        "import data_sharding.verify, data_sharding.inspect\n"
        f"write_dataset({images!r}, {str(tmp_path / 'set')!r}, max_tokens=16, workers=1, progress=False)\n"
        "assert not {'torch', 'diffusers', 'webdataset'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", call], check=True, cwd=ROOT)


def test_the_command(images, folder, tmp_path, capsys):
    from fitv2_scale.cli.__main__ import main

    command = ["shard", "write", images, str(tmp_path / "set"), "--codec", "sd-vae", "--max-tokens", "16"]
    assert main([*command, "--workers", "1"]) == 2
    assert "--vae FOLDER" in capsys.readouterr().err
    assert main([*command, "--workers", "1", "--vae", folder]) == 0
    assert Manifest.load(str(tmp_path / "set")).header.codec["latent"] == "mean"


def test_a_run_on_such_latents_makes_pictures_and_says_at_once_if_it_cannot(written, folder, tmp_path):
    options = {"train__steps": 2, "sampling__every_steps": 2, "sampling__sizes": ["32x48"], "sampling__steps": 2}
    options |= {"model__classes": 3}
    config = make_tiny(str(written[0]), tmp_path, "with", sampling__vae=folder, **options)
    assert run_ranks(2, train, config, timeout=300) == [0, 0]
    assert Run.open(config.run).store.list("samples/") == ["samples/00000002.png"]
    with pytest.raises(UserError, match="set sampling.vae to the folder"):
        run_ranks(1, train, make_tiny(str(written[0]), tmp_path, "without", **options))
    plain = make_tiny(str(written[0]), tmp_path, "plain", **options | {"sampling__every_steps": 0})
    assert run_ranks(1, train, plain) == [0]  # without pictures nobody needs a VAE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_bits_each_time_and_nearly_those_of_a_cpu(folder, monkeypatch):
    batch = pixels(8, 64, 64)
    first, second = (load_vae(folder, "sample").encode(batch, draws(8)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    load_vae.cache_clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    np.testing.assert_allclose(load_vae(folder, "sample").encode(batch, draws(8)), first, rtol=1e-3, atol=1e-4)
    load_vae.cache_clear()
