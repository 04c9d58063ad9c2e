"""Importing damaged, contradictory or incomplete files: they are named and left out, or the error is one sentence."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_sharding.errors import UserError
from data_sharding.verify import verify
from data_sharding.write.import_latents import import_dataset
from tests.support.published_latents import GROUPS, OPTIONS, latent, published, shards_of, write_layout


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"feature": None}, "it has no tensor 'feature'"),
        ({"label": None}, "it has no tensor 'label'"),
        ({"feature": np.zeros((3, 4, 16), np.float32)}, r"feature is float32\[3, 4, 16\], not float32\[2, h, w, 16\]"),
        ({"feature": np.zeros((2, 3, 4, 16), np.int32)}, "feature is int32"),
        ({"feature": np.full((2, 3, 4, 16), np.nan, np.float32)}, "not finite in float16"),
        ({"feature": np.full((2, 3, 4, 16), 7e4, np.float32)}, "not finite in float16"),
        ({"size": np.array([4, 3])}, r"size \[4, 3\] is not that of the feature, \[3, 4\]"),
        ({"grid": np.zeros((2, 12))}, "grid does not number"),
        ({"grid": np.mgrid[:3, :4].reshape(2, -1)}, "grid does not number"),  # rows first
        ({"grid": np.zeros((2, 11))}, "grid does not number"),
        ({"label": np.array(1000)}, r"label \[1000\] is not one of 0 \.\. 999"),
        ({"label": np.array(0.5)}, r"label \[0\.5\]"),
    ],
)
def test_a_file_that_is_not_as_described_is_named_and_left_out(tmp_path, changes, reason):
    files = {group: {} for group in GROUPS} | {GROUPS[0]: {"good.safetensors": latent("good", 3, 4, 0)}}
    files[GROUPS[1]] = {"bad.safetensors": latent("bad", 3, 4, 0, **changes)}
    files[GROUPS[2]] = {"bad.safetensors": latent("bad", 4, 4, 0)}
    check_skipped(tmp_path, files, reason)


def check_skipped(tmp_path, files, reason):
    report = import_dataset(str(write_layout(tmp_path / "src", "tar", files)), str(tmp_path / "set"), **OPTIONS)
    assert (report.images, report.skipped) == (1, 1)
    (entry,) = json.loads((tmp_path / "set/skipped.json").read_bytes())
    assert entry["source"] == "bad.safetensors"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(entry["reason"])
    assert verify(str(tmp_path / "set")).problems == ()


@pytest.mark.parametrize(
    ("resize", "crop", "reason"),
    [
        (latent("r", 3, 4, 0)[:-7], None, "not a complete .safetensors"),
        (b"", None, "not a complete .safetensors"),
        (latent("r", 3, 4, 1), latent("c", 4, 4, 2), "different labels"),
        (None, latent("c", 4, 4, 2), "a crop view, but no resize view"),
        (latent("r", 4, 5, 1), None, "4x5 are more than 16 tokens"),
    ],
)
def test_damaged_or_contradicting_files_are_named_and_left_out(tmp_path, resize, crop, reason):
    files = {GROUPS[0]: {"good.safetensors": latent("good", 3, 4, 0)}}
    files[GROUPS[1]] = {"bad.safetensors": resize} if resize is not None else {}
    files[GROUPS[2]] = {"bad.safetensors": crop} if crop is not None else {}
    check_skipped(tmp_path, files, reason)


def test_bfloat16_is_called_so(tmp_path):
    files = {GROUPS[0]: {"good.safetensors": latent("good", 3, 4, 0)}, GROUPS[2]: {}}
    header = {"feature": {"dtype": "BF16", "shape": [2, 3, 4, 16], "data_offsets": [0, 768]}}
    text = json.dumps(header).encode()
    files[GROUPS[1]] = {"bad.safetensors": len(text).to_bytes(8, "little") + text + bytes(768)}
    check_skipped(tmp_path, files, "feature is bfloat16, which is not supported: store it as float32")


def test_files_that_cannot_be_read_are_named_and_links_are_followed(tmp_path):
    files = {group: {} for group in GROUPS} | {GROUPS[0]: {"a.safetensors": latent("a", 3, 4, 0)}}
    src = write_layout(tmp_path / "src", "folders", files)
    for group in GROUPS[1:]:
        (src / group).mkdir(exist_ok=True)
    (tmp_path / "b.safetensors").write_bytes(latent("b", 3, 4, 1))
    (src / GROUPS[0] / "b.safetensors").symlink_to(tmp_path / "b.safetensors")
    (src / GROUPS[0] / "gone.safetensors").symlink_to("nowhere")
    os.mkfifo(src / GROUPS[0] / "pipe.safetensors")
    (src / GROUPS[0] / "notes.txt").touch()
    (src / GROUPS[1]).rename(tmp_path / "moved")
    (src / GROUPS[1]).symlink_to(tmp_path / "moved")
    report = import_dataset(str(src), str(tmp_path / "set"), **OPTIONS)
    assert (report.images, report.skipped, report.left_aside) == (2, 2, {".md": 1, ".txt": 1, "folder less_than_16": 1})
    skipped = {e["source"]: e["reason"] for e in json.loads((tmp_path / "set/skipped.json").read_bytes())}
    assert skipped == {
        "gone.safetensors": "a link to nothing",
        "pipe.safetensors": "a pipe, a socket or a device, not a file",
    }


def test_a_hard_link_in_a_tar_of_latents_is_read(tmp_path):
    files = {group: {} for group in GROUPS} | {GROUPS[0]: {"a.safetensors": latent("a", 3, 4, 0)}}
    src = write_layout(tmp_path / "src", "tar", files)
    with tarfile.open(src / f"{GROUPS[0]}.tar", "a") as tar:
        for name, link in (("b", "a"), ("c", "nowhere")):
            info = tarfile.TarInfo(f"{GROUPS[0]}/{name}.safetensors")
            target = next(m.name for m in tar.getmembers() if m.name.endswith("a.safetensors")) if link == "a" else link
            info.type, info.linkname = tarfile.LNKTYPE, target
            tar.addfile(info)
    report = import_dataset(str(src), str(tmp_path / "set"), **OPTIONS)
    assert (report.images, report.skipped) == (2, 1)


def test_a_name_in_a_tar_that_is_not_utf8_is_left_out_by_name(tmp_path):
    files = {group: {} for group in GROUPS}
    files[GROUPS[0]] = {f"{name}.safetensors": latent("a", 3, 4, 0) for name in ("a", os.fsdecode(b"caf\xe9"))}
    report = import_dataset(str(write_layout(tmp_path / "src", "tar", files)), str(tmp_path / "set"), **OPTIONS)
    assert (report.images, report.skipped) == (1, 1)
    (entry,) = json.loads((tmp_path / "set/skipped.json").read_bytes())
    assert entry["source"].endswith("caf\\xe9.safetensors")
    assert entry["reason"] == "the name is not UTF-8: rename the file"


def test_sources_that_lack_something_are_one_sentence_each(tmp_path):
    dst = str(tmp_path / "set")

    def refused(name: str, layout: str, match: str, change) -> None:
        src = write_layout(tmp_path / name, layout)
        change(src)
        with pytest.raises(UserError, match=match):
            import_dataset(str(src), dst, **OPTIONS)
        assert not Path(dst, "manifest.json").exists()
        shutil.rmtree(dst, ignore_errors=True)

    first = "from_16_to_16.tar.gz.part_"
    refused("group", "folders", "lacks greater_than_16_crop", lambda src: shutil.rmtree(src / GROUPS[2]))
    refused("none", "parts", "a part of from_16_to_16 before ac", lambda src: (src / f"{first}ab").unlink())
    refused("first", "parts", "a part of from_16_to_16 before ab", lambda src: (src / f"{first}aa").unlink())
    refused("last", "parts", "from_16_to_16 ends too early: its last part", lambda src: (src / f"{first}ac").unlink())
    both = GROUPS[1] + ".tar"
    refused("both", "folders", "both as a folder and as an archive", lambda src: (src / both).write_bytes(b""))

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    refused("flip", "gz", f"{GROUPS[1]} is damaged", lambda src: flip(src / f"{GROUPS[1]}.tar.gz"))
    cut = GROUPS[2] + ".tar"
    refused(
        "cut", "tar", "greater_than_16_crop.tar is truncated|not a complete tar", lambda src: shorten(src / cut, 10240)
    )
    refused("cut2", "tar", "not a complete tar", lambda src: shorten(src / cut, 15000))
    refused("not", "tar", "not a complete tar", lambda src: (src / cut).write_bytes(b"x" * 2000))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds none of the published folders"):
        import_dataset(str(tmp_path / "empty"), dst)
    with pytest.raises(UserError, match="there is nothing at .*nowhere: check the path"):
        import_dataset(str(tmp_path / "nowhere"), dst)


def test_what_was_unpacked_from_a_bad_download_is_not_kept(imported, tmp_path):
    """The second download has the name and size of the first, and a split tar has no checksum, unlike gzip."""
    src = write_layout(tmp_path / "src", "tar")
    data = bytearray((src / f"{GROUPS[0]}.tar").read_bytes())
    (src / f"{GROUPS[0]}.tar").unlink()
    first, second = src / f"{GROUPS[0]}.tar.part_aa", src / f"{GROUPS[0]}.tar.part_ab"
    second.write_bytes(data[5000:])
    data[100] ^= 1
    first.write_bytes(data[:5000])
    with pytest.raises(UserError, match="not a complete tar"):
        import_dataset(str(src), str(tmp_path / "set"), **OPTIONS)
    data[100] ^= 1
    first.write_bytes(data[:5000])
    import_dataset(str(src), str(tmp_path / "set"), **OPTIONS)
    assert shards_of(tmp_path / "set") == shards_of(imported[1])


def shorten(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def test_of_two_sets_one_must_be_chosen(tmp_path, imported):
    src = write_layout(tmp_path / "src", "folders")
    for group in GROUPS:
        (src / group.replace("16", "25").replace("from_25", "from_16")).mkdir()
    with pytest.raises(UserError, match="at most 16, 25 tokens: give one of these numbers as --max-tokens"):
        import_dataset(str(src), str(tmp_path / "set"), **OPTIONS)
    import_dataset(str(src), str(tmp_path / "set"), max_tokens=16, **OPTIONS)
    assert shards_of(tmp_path / "set") == shards_of(imported[1])
    with pytest.raises(UserError, match="at most 16, 25 tokens: give one of these numbers as --max-tokens"):
        import_dataset(str(src), str(tmp_path / "other"), max_tokens=36, **OPTIONS)


def test_an_image_in_two_groups_is_refused(tmp_path):
    files = published()
    files[GROUPS[0]]["l3.safetensors"] = files[GROUPS[1]]["l3.safetensors"]
    with pytest.raises(UserError, match="the resize view of l3.safetensors occurs twice"):
        import_dataset(str(write_layout(tmp_path / "src", "folders", files)), str(tmp_path / "set"), **OPTIONS)


def test_another_source_or_option_is_refused(imported, tmp_path):
    files = published()
    del files[GROUPS[0]]["s3.safetensors"]
    src = write_layout(tmp_path / "src", "folders", files)
    with pytest.raises(UserError, match="was started with another source"):
        import_dataset(str(src), str(imported[1]), **OPTIONS)
    with pytest.raises(UserError, match="was started with another images_per_shard"):
        import_dataset(str(imported[0]), str(imported[1]), **OPTIONS | {"images_per_shard": 7})
