"""A folder of pictures holds those of one set of weights, known by their content."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from xxhash import xxh3_128_hexdigest

from data_sharding.errors import StorageDown, UserError
from data_sharding.format.codecs import get_codec
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.evaluate.sampling.load_weights import Weights, open_weights
from fitv2_scale.evaluate.sampling.png_folder import chunk_requests, fill_folder, image_file, random_requests, write_npz
from fitv2_scale.evaluate.sampling.sampler import ImageRequest
from fitv2_scale.parallel.world import join
from tests.support.faulty_disk import FaultyDisk
from tests.support.other_weights import replace_weights, weights_of


@pytest.fixture
def sampled(tmp_path):
    """``sampled(images, source, config, overrides)``: how many pictures the call made."""

    def run(images: int, source: str, config: str | None = None, *overrides: str) -> int:
        with join() as world, open_weights(source, world, config, ["sampling.steps=1", *overrides]) as weights:
            requests = random_requests(["32x32"], images, [0, 1, 2], 5, 16)
            settings = weights.config.sampling
            return fill_folder(weights, requests, settings, 5, str(tmp_path / "folder"), weights.codec()).made

    return run


@pytest.mark.parametrize(
    "cfg,max_tokens,sizes,expected",
    [
        (1.0, 64, [(4, 4)] * 10, [8, 2]),  # 128 tokens on two ranks
        (1.5, 64, [(4, 4)] * 10, [4, 4, 2]),  # guided, an image takes twice its tokens
        (1.5, 64, [(2, 2), (6, 10), (4, 4), (8, 9), (1, 1)], [2, 1, 1, 1]),  # one that is too large goes by itself
        (1.0, 10_000, [(1, 1)] * 1000, [512, 488]),  # at most 256 of a rank
    ],
)
def test_as_many_images_are_made_at_once_as_packs_hold(cfg, max_tokens, sizes, expected):
    layout = SimpleNamespace(max_tokens=max_tokens)
    weights = SimpleNamespace(layout=SimpleNamespace(data_parallel=2), config=SimpleNamespace(layout=layout))
    requests = [ImageRequest(i, 0, rows, columns) for i, (rows, columns) in enumerate(sizes)]
    chunks = list(chunk_requests(requests, weights, SamplingConfig(cfg=cfg)))
    assert [len(chunk) for chunk in chunks] == expected and sum(chunks, []) == requests


def request(tmp_path) -> dict:
    return json.loads((tmp_path / "folder" / "request.json").read_text())


def test_other_weights_at_the_same_path_do_not_continue_a_folder(sampled, two_step_run, tmp_path):
    file, config = weights_of(two_step_run, tmp_path / "first")
    shutil.copy(file, old := tmp_path / "old.safetensors")
    assert sampled(2, file, config) == 2
    assert request(tmp_path)["weights_digest"] == xxh3_128_hexdigest(old.read_bytes())
    replace_weights(file)
    with pytest.raises(UserError, match=r"folder holds other images \(weights_digest: .*give another folder"):
        sampled(4, file, config)
    assert not image_file(str(tmp_path / "folder"), 2).exists()
    # The same weights elsewhere continue it.
    assert sampled(4, str(old), config) == 2 and sampled(4, str(old), config) == 0


def test_another_network_or_codec_does_not_continue_a_folder(sampled, two_step_run, tmp_path, monkeypatch):
    """Neither is in the weights: QK-norm has none, and latents may come from a dataset that was replaced."""
    file, config = weights_of(two_step_run, tmp_path / "first")
    assert sampled(2, file, config) == 2
    with pytest.raises(UserError, match=r'\(model\.qk_norm: "layernorm" -> "none"\)'):
        sampled(3, file, config, "model.qk_norm=none")
    negative = SimpleNamespace(digest="00", decode=lambda latent: 255 - get_codec("dct").decode(latent))
    monkeypatch.setattr(Weights, "codec", lambda self: negative)
    with pytest.raises(UserError, match=rf'\(codec: "{get_codec("dct").digest}" -> "00"\)'):
        sampled(3, file, config)
    assert not image_file(str(tmp_path / "folder"), 2).exists()


def test_a_folder_of_an_earlier_version(sampled, two_step_run, tmp_path):
    """It recorded the weights' name alone, and settings without the keys of today. A commit's name still says which
    weights they are; a file's does not."""

    def as_before() -> None:
        record = request(tmp_path)
        for key in ("weights_digest", "codec", "model"):
            del record[key]
        del record["sampling"]["guided_channels"]
        (tmp_path / "folder" / "request.json").write_text(json.dumps(record))

    assert sampled(2, two_step_run) == 2
    as_before()
    assert sampled(3, two_step_run) == 1
    as_before()
    with pytest.raises(UserError, match=r'sampling\.guided_channels: "all" -> "three"'):
        sampled(4, two_step_run, None, "sampling.guided_channels=three")
    shutil.rmtree(tmp_path / "folder")
    file, config = weights_of(two_step_run, tmp_path / "first")
    assert sampled(2, file, config) == 2
    as_before()
    with pytest.raises(UserError, match=r"codec: \(absent\) -> "):
        sampled(3, file, config)


def test_pictures_that_nobody_recorded_are_not_taken_for_ours(sampled, two_step_run, tmp_path):
    image_file(str(tmp_path / "folder"), 1).parent.mkdir()
    image_file(str(tmp_path / "folder"), 1).write_bytes(b"a picture of somebody else")
    with pytest.raises(UserError, match="000001.png was not made here, no request.json there tells"):
        sampled(3, two_step_run)
    assert [path.name for path in Path(tmp_path / "folder").iterdir()] == ["000001.png"]


def test_a_full_disk_is_a_sentence_and_the_folder_is_continued(sampled, two_step_run, tmp_path, monkeypatch):
    disk = FaultyDisk(monkeypatch)
    disk.fail(errno.ENOSPC, "000001.png", "write")
    with pytest.raises(StorageDown, match="000001.png cannot be written: No space left on device; free some space"):
        sampled(2, two_step_run)
    disk.fail(0, "nothing")
    assert sampled(2, two_step_run) == 1


def test_an_npz_that_cannot_be_written_or_has_a_damaged_picture_is_a_sentence(tmp_path, monkeypatch):
    requests = random_requests(["32x48"], 3, [0, 1, 2], 5, 16)
    for request in requests:
        Image.new("RGB", (48, 32)).save(image_file(str(tmp_path), request.index))
    disk = FaultyDisk(monkeypatch)
    disk.fail(errno.ENOSPC, "all.npz", "write")
    with pytest.raises(StorageDown, match="all.npz cannot be written: No space left on device"):
        write_npz(str(tmp_path), requests, str(tmp_path / "all.npz"), 16)
    disk.fail(0, "nothing")
    image_file(str(tmp_path), 2).write_bytes(b"no picture")
    with pytest.raises(UserError, match="000002.png cannot be read .*remove it, and the command makes it again"):
        write_npz(str(tmp_path), requests, str(tmp_path / "all.npz"), 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"00000{i}.png" for i in range(3)]


def test_a_picture_that_the_record_does_not_list_is_refused_by_name(sampled, two_step_run, tmp_path):
    assert sampled(2, two_step_run) == 2
    picture = image_file(str(tmp_path / "folder"), 3)
    Image.new("RGB", (32, 32), "red").save(picture)
    with pytest.raises(UserError, match=r"000003\.png was not made here, request\.json does not list it: move it away"):
        sampled(4, two_step_run)
    assert Image.open(picture).getpixel((0, 0)) == (255, 0, 0)
    picture.unlink()
    assert sampled(4, two_step_run) == 2


def test_what_a_power_cut_has_damaged_is_made_again(sampled, two_step_run, tmp_path):
    assert sampled(4, two_step_run) == 4
    files = [image_file(str(tmp_path / "folder"), i) for i in range(4)]
    whole = [file.read_bytes() for file in files]
    files[0].write_bytes(b"")
    files[1].write_bytes(bytes(len(whole[1])))
    files[2].write_bytes(whole[2][:-100] + bytes(100))
    assert sampled(4, two_step_run) == 3
    assert [file.read_bytes() for file in files] == whole


def test_a_picture_of_another_size_is_refused_where_one_of_ours_was(sampled, two_step_run, tmp_path):
    assert sampled(2, two_step_run) == 2
    Image.new("RGB", (48, 32)).save(image_file(str(tmp_path / "folder"), 1))
    with pytest.raises(UserError, match=r"000001\.png is 32x48 in RGB, not 32x32 in RGB, .*move it away"):
        sampled(2, two_step_run)


@pytest.fixture
def three(tmp_path):
    """Three plain pictures of 16 x 32, in levels 10, 11 and 12, and the requests for them."""
    for i in range(3):
        Image.new("RGB", (32, 16), (10 + i,) * 3).save(image_file(str(tmp_path), i))
    return random_requests(["16x32"], 3, [7], 0, 16)


def test_an_npz_holds_each_picture_in_its_place(three, tmp_path):
    write_npz(str(tmp_path), three, file := str(tmp_path / "all.npz"), 16)
    with np.load(file) as found:
        assert found["arr_0"].shape == (3, 16, 32, 3) and found["arr_1"].tolist() == [7, 7, 7]
        assert [set(image.ravel().tolist()) for image in found["arr_0"]] == [{10}, {11}, {12}]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "mode,size,sentence",
    [
        ("RGB", (16, 32), r"is 32x16 in RGB, not 16x32 in RGB"),
        ("RGB", (64, 64), r"is 64x64 in RGB, not 16x32 in RGB"),
        ("RGBA", (32, 16), r"is 16x32 in RGBA, not 16x32 in RGB"),
        ("L", (32, 16), r"is 16x32 in L, not 16x32 in RGB"),
    ],
)
def test_an_npz_with_a_foreign_picture_is_not_written(three, tmp_path, place, mode, size, sentence):
    """One of another size would move all later pictures in the array."""
    Image.new(mode, size).save(image_file(str(tmp_path), place))
    with pytest.raises(UserError, match=rf"00000{place}\.png {sentence}"):
        write_npz(str(tmp_path), three, str(tmp_path / "all.npz"), 16)
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("kept", [0, 40])
def test_an_npz_with_a_damaged_picture_is_not_written(three, tmp_path, kept):
    damaged = image_file(str(tmp_path), 1)
    damaged.write_bytes(damaged.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"000001\.png cannot be read \(it is damaged\): remove it"):
        write_npz(str(tmp_path), three, str(tmp_path / "all.npz"), 16)
    assert not list(tmp_path.glob("*.npz"))
