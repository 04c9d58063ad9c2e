"""Datasets of the latents of a VAE: what they hold, what their manifest names, and a run on them."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_sharding.errors import UserError
from data_sharding.format.codec import Draw
from data_sharding.format.codecs import codec_of, get_codec
from data_sharding.format.manifest import Manifest
from data_sharding.format.patches import patchify, unpatchify
from data_sharding.format.sd_vae import load_vae
from data_sharding.stream.frames import read_frame
from data_sharding.stream.packed_batches import packed_batches
from data_sharding.verify import verify
from data_sharding.write.image_file import load_rgb
from data_sharding.write.image_sources import open_folder
from data_sharding.write.images import write_dataset
from data_sharding.write.views import views_of
from fitv2_scale.run.run import Run
from fitv2_scale.train.loop import train
from tests.support.ranks import run_ranks
from tests.support.repository import ROOT
from tests.support.small_vae import save_vae
from tests.support.tiny_runs import make_tiny
from tests.support.written_datasets import bytes_of, make_images

OPTIONS = {"codec": "sd-vae", "max_tokens": 16, "images_per_shard": 5, "progress": False}


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("images")
    make_images(root, 18)
    return str(root)


@pytest.fixture(scope="module")
def written_dataset(image_folder, vae_folder, tmp_path_factory):
    dst = tmp_path_factory.mktemp("written") / "set"
    return dst, write_dataset(image_folder, str(dst), workers=1, vae=vae_folder, latent="sample", **OPTIONS)


def test_a_dataset_holds_the_latents_of_its_pictures(image_folder, vae_folder, written_dataset):
    """Both views, both flips, batched or one by one."""
    dst, report = written_dataset
    assert (report.images, report.skipped) == (18, 0) and verify(str(dst)).problems == ()
    entries = {entry.id: entry for entry in open_folder(image_folder).entries}
    codec = get_codec("sd-vae", vae_folder, "sample")
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


def test_two_processes_write_the_same_bytes_as_one(image_folder, vae_folder, written_dataset, tmp_path):
    write_dataset(image_folder, str(tmp_path / "set"), workers=2, vae=vae_folder, latent="sample", **OPTIONS)
    assert bytes_of(tmp_path / "set") == bytes_of(written_dataset[0])


def test_the_manifest_names_weights_scale_and_kind_of_latent(image_folder, vae_folder, written_dataset, tmp_path):
    codec = Manifest.load(str(written_dataset[0])).header.codec
    assert codec["name"] == "sd-vae" and codec["scale"] == 0.18215 and codec["latent"] == "sample"
    assert codec["vae"] == load_vae(vae_folder, "mean").weights
    assert codec["digest"] != get_codec("sd-vae", vae_folder, "mean").digest
    with pytest.raises(UserError, match="was started with another codec"):
        write_dataset(image_folder, str(written_dataset[0]), vae=vae_folder, latent="mean", **OPTIONS)
    other = save_vae(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was started with another codec"):
        write_dataset(image_folder, str(written_dataset[0]), vae=other, latent="sample", **OPTIONS)


def test_pictures_come_from_the_header_and_a_folder(vae_folder, written_dataset, tmp_path):
    header = Manifest.load(str(written_dataset[0])).header
    codec = codec_of(header.codec, vae_folder)
    latent = unpatchify(read_frame(Manifest.load(str(written_dataset[0])), 0)[0].views["resize"][0])
    assert Image.fromarray(codec.decode(latent)).size == (latent.shape[2] * 8, latent.shape[1] * 8)
    with pytest.raises(UserError, match="set sampling.vae to the folder"):
        codec_of(header.codec)
    other = save_vae(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was written with the VAE .*, but .* holds"):
        codec_of(header.codec, other)
    from data_sharding.write.import_latents import CODEC

    assert codec_of(CODEC, other).scale == 0.18215  # the published latents say no digest
    assert codec_of(get_codec("dct").record).name == "dct"


def test_torch_is_imported_for_this_codec_alone(image_folder, tmp_path):
    call = (
        "import sys\nfrom data_sharding.write.images import write_dataset\nimport data_sharding.write.import_latents\n"
        "import data_sharding.verify, data_sharding.inspect\n"
        f"write_dataset({image_folder!r}, {str(tmp_path / 'set')!r}, max_tokens=16, workers=1, progress=False)\n"
        "assert not {'torch', 'diffusers', 'webdataset'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", call], check=True, cwd=ROOT)


def test_the_command(image_folder, vae_folder, tmp_path, capsys):
    from fitv2_scale.cli.__main__ import main

    command = ["shard", "write", image_folder, str(tmp_path / "set"), "--codec", "sd-vae", "--max-tokens", "16"]
    assert main([*command, "--workers", "1"]) == 2
    assert "--vae FOLDER" in capsys.readouterr().err
    assert main([*command, "--workers", "1", "--vae", vae_folder]) == 0
    assert Manifest.load(str(tmp_path / "set")).header.codec["latent"] == "mean"


def test_a_run_on_such_latents_makes_pictures_and_says_at_once_if_it_cannot(written_dataset, vae_folder, tmp_path):
    options = {"train__steps": 2, "sampling__every_steps": 2, "sampling__sizes": ["32x48"], "sampling__steps": 2}
    options |= {"model__classes": 3}
    config = make_tiny(str(written_dataset[0]), tmp_path, "with", sampling__vae=vae_folder, **options)
    assert run_ranks(2, train, config, timeout=300) == [0, 0]
    assert Run.open(config.run).store.list("samples/") == ["samples/00000002.png"]
    with pytest.raises(UserError, match="set sampling.vae to the folder"):
        run_ranks(1, train, make_tiny(str(written_dataset[0]), tmp_path, "without", **options))
    plain = make_tiny(str(written_dataset[0]), tmp_path, "plain", **options | {"sampling__every_steps": 0})
    assert run_ranks(1, train, plain) == [0]  # without pictures nobody needs a VAE


def test_latents_of_16_channels_from_images_to_a_run(image_folder, tmp_path, vae_folder):
    """A stored token has 64 numbers, of which a patch of 4 has four times as many. The record of a codec with 4
    channels names no number, so that older datasets keep their digests."""
    vae = save_vae(tmp_path / "vae", latent_channels=16)
    write_dataset(image_folder, url := str(tmp_path / "set"), workers=1, vae=vae, **OPTIONS)
    assert verify(url).problems == ()
    manifest = Manifest.load(url)
    assert manifest.header.codec["channels"] == manifest.header.latent_channels == 16
    assert read_frame(manifest, 0)[0].views["resize"].shape[3] == 64
    assert get_codec("dct").record.keys() == {"name", "digest", "scale"}
    assert get_codec("sd-vae", vae_folder).record.keys() == {"name", "digest", "scale", "latent", "vae"}
    with packed_batches(url, images=5, max_tokens=64, steps=range(1)) as batches:
        assert next(batches).packs[0].latents.shape[1] == 64
    pictures = {"sampling__every_steps": 2, "sampling__sizes": ["32x64"], "sampling__steps": 2, "sampling__vae": vae}
    for name, patch in (("two", 2), ("four", 4)):
        model = {"model__classes": 3, "model__latent_channels": 16, "model__patch": patch}
        config = make_tiny(url, tmp_path, name, train__steps=2, **model, **pictures)
        assert run_ranks(2, train, config, timeout=300) == [0, 0]
        grid = Image.open(io.BytesIO(Run.open(config.run).store.read("samples/00000002.png")))
        assert grid.size == (4 + 3 * (64 + 4), 4 + 32 + 4)
