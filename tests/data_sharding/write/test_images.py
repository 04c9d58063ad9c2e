"""Writing: each image is stored once, finished datasets are not changed, bad images and options are one sentence."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from data_sharding.errors import UserError
from data_sharding.format.codecs import get_codec
from data_sharding.format.manifest import Manifest
from data_sharding.stream.frames import read_frame
from data_sharding.verify import verify
from data_sharding.write import build, entries
from data_sharding.write.entries import sample_id
from data_sharding.write.image_sources import open_folder
from data_sharding.write.images import write_dataset
from tests.support.written_datasets import OPTIONS, make_images


def ids_of(url) -> list[int]:
    return Manifest.load(str(url)).sample_id.tolist()


def test_every_image_is_stored_once_with_its_label(image_folder, written_dataset):
    dst, report = written_dataset
    entries = {entry.id: entry for entry in open_folder(image_folder).entries}
    train, held = ids_of(dst), ids_of(dst / "holdout")
    assert sorted(train + held) == sorted(entries) and len(held) == 6 == report.held_out
    assert (report.images, report.skipped, report.shards, report.encoded) == (54, 0, 8 + 1, 60)
    assert train == sorted(train)
    for url in (dst, dst / "holdout"):
        assert verify(str(url)).problems == ()
        manifest = Manifest.load(str(url))
        assert manifest.classes == ("ant", "bee", "cow")
        assert manifest.label.tolist() == [entries[i].label for i in manifest.sample_id.tolist()]
    assert not list(dst.rglob("parts")) and not list(dst.rglob("*.tmp"))


def test_views_and_flips_are_those_of_the_pixels(image_folder, written_dataset):
    from data_sharding.write.image_file import load_rgb
    from data_sharding.write.views import encode_views, views_of

    entries = {entry.id: entry for entry in open_folder(image_folder).entries}
    manifest = Manifest.load(str(written_dataset[0]))
    crops = 0
    for sample in read_frame(manifest, 0):
        image = load_rgb(entries[sample.id].data.read())
        expected = encode_views({0: views_of(image, 16)}, get_codec("dct"))[0]
        assert sample.views.keys() == expected.keys()
        crops += "crop" in expected
        for view, array in expected.items():
            np.testing.assert_array_equal(sample.views[view], array)
    assert crops > 0


def test_progress_is_shown_unless_it_is_turned_off(tmp_path, capsys):
    make_images(tmp_path / "images", 3)
    for name, options, shown in (("a", {}, True), ("b", {"progress": False}, False)):
        write_dataset(str(tmp_path / "images"), str(tmp_path / name), max_tokens=16, workers=1, **options)
        assert ("3/3 images" in capsys.readouterr().err) == shown


def test_a_finished_dataset_is_not_changed(image_folder, written_dataset):
    dst, first = written_dataset
    before = {file: file.stat().st_mtime_ns for file in dst.rglob("*")}
    again = write_dataset(image_folder, str(dst), **OPTIONS)
    assert {file: file.stat().st_mtime_ns for file in dst.rglob("*")} == before
    assert again.encoded == 0
    assert (again.images, again.held_out, again.shards, again.bytes) == (
        first.images, first.held_out, first.shards, first.bytes,
    )  # fmt: skip


@pytest.mark.parametrize("change", [{"max_tokens": 25}, {"holdout": 0.2}, {"images_per_shard": 8}])
def test_other_options_are_refused_finished_or_not(image_folder, written_dataset, tmp_path, monkeypatch, change):
    name = next(iter(change))
    with pytest.raises(UserError, match=f"was started with another {name} .*or give another folder"):
        write_dataset(image_folder, str(written_dataset[0]), **{**OPTIONS, **change})

    def killed(tasks, write_shard, *_):
        write_shard(tasks[0], lambda *_: None)
        sys.exit("killed")

    monkeypatch.setattr(build, "run_tasks", killed)
    with pytest.raises(SystemExit):
        write_dataset(image_folder, str(tmp_path), workers=1, **OPTIONS)
    with pytest.raises(UserError, match=f"was started with another {name} .*or remove it \\(rm -r {tmp_path}\\)"):
        write_dataset(image_folder, str(tmp_path), **{**OPTIONS, **change})


def test_another_source_is_refused(image_folder, written_dataset, tmp_path):
    make_images(tmp_path / "fewer", 59)
    with pytest.raises(UserError, match="was started with another source"):
        write_dataset(str(tmp_path / "fewer"), str(written_dataset[0]), **OPTIONS)


def test_holdout_is_exact_and_independent_of_sharding(image_folder, written_dataset, tmp_path):
    write_dataset(image_folder, str(tmp_path / "other"), workers=1, **{**OPTIONS, "images_per_shard": 50})
    assert ids_of(tmp_path / "other/holdout") == ids_of(written_dataset[0] / "holdout")
    assert ids_of(tmp_path / "other") == ids_of(written_dataset[0])
    assert Manifest.load(str(tmp_path / "other")).digest != Manifest.load(str(written_dataset[0])).digest


def test_unreadable_images_are_listed_and_the_rest_is_written(tmp_path):
    make_images(tmp_path / "images", 12)
    good = tmp_path / "images/ant/000.jpg"
    truncated, text = tmp_path / "images/bee/001.jpg", tmp_path / "images/cow/002.jpg"
    data = truncated.read_bytes()
    truncated.write_bytes(data[: len(data) // 2])
    text.write_text("this is no image")
    (tmp_path / "images/ant/notes.txt").write_text("not named like an image, so left aside")
    options = {"max_tokens": 16, "images_per_shard": 1, "progress": False}  # two shards have no image left
    report = write_dataset(str(tmp_path / "images"), str(tmp_path / "set"), workers=1, **options)
    assert (report.images, report.skipped, report.shards) == (10, 2, 10)
    skipped = json.loads((tmp_path / "set/skipped.json").read_bytes())
    assert [entry["source"] for entry in skipped] == ["bee/001.jpg", "cow/002.jpg"]
    assert "truncated" in skipped[0]["reason"] and skipped[1]["reason"] == "not an image of a known format"
    assert sample_id("ant/000.jpg") in ids_of(tmp_path / "set") and good.exists()
    assert verify(str(tmp_path / "set")).problems == ()
    again = write_dataset(str(tmp_path / "images"), str(tmp_path / "set"), **options)
    assert (again.skipped, again.encoded) == (2, 0)  # still reported, so the command still fails


def test_no_readable_image_at_all_is_an_error(tmp_path):
    (tmp_path / "images/ant").mkdir(parents=True)
    (tmp_path / "images/ant/a.jpg").write_bytes(b"nothing")
    with pytest.raises(
        UserError, match=r"none of the 1 images of .* could be read, for example ant/a\.jpg \(not an image"
    ):
        write_dataset(str(tmp_path / "images"), str(tmp_path / "set"), workers=1, progress=False)
    assert not (tmp_path / "set/manifest.json").exists()


def test_bad_sources_are_one_sentence_each(tmp_path):
    for make, message in (
        (lambda: None, "there is nothing at .*src: check the path"),
        (lambda: (tmp_path / "src").mkdir(), "is empty"),
        (lambda: (tmp_path / "src/a.jpg").write_bytes(b""), "has no class folders"),
        (lambda: (tmp_path / "src/.git").mkdir(), "has no class folders"),
        (lambda: (tmp_path / "src/a.jpg").rename(tmp_path / "a.jpg"), "has no class folders"),
        (lambda: (tmp_path / "src/ant").mkdir(), "hold no images"),
    ):
        make()
        with pytest.raises(UserError, match=message):
            write_dataset(str(tmp_path / "src"), str(tmp_path / "dst"))
        assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 200}, "must be a square number"),
        ({"max_tokens": 0}, "must be a square number"),
        ({"holdout": 1.0}, "at least 0 and below 1"),
        ({"holdout": 0.001}, "sets aside 0 of 60 images"),
        ({"images_per_shard": 0}, "at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"codec": "jpeg"}, "there is no codec 'jpeg': use 'dct' or 'sd-vae'"),
    ],
)
def test_bad_options_are_one_sentence_each(image_folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        write_dataset(image_folder, str(tmp_path / "dst"), progress=False, **options)


def test_a_destination_inside_the_source_is_refused(image_folder):
    with pytest.raises(UserError, match="lies inside the source"):
        write_dataset(image_folder, f"{image_folder}/dst")
    assert not (Path(image_folder) / "dst").exists()


def test_labels_follow_all_class_folders_and_ids_only_the_key(tmp_path):
    make_images(tmp_path / "a", 6)
    make_images(tmp_path / "elsewhere/b", 3)
    (tmp_path / "a/bat").mkdir()  # a class without images keeps its label
    here, there = open_folder(str(tmp_path / "a")), open_folder(str(tmp_path / "elsewhere/b"))
    assert here.classes == ("ant", "bat", "bee", "cow")
    assert {e.key: e.label for e in here.entries}["bee/001.jpg"] == 2
    assert {e.key: e.id for e in there.entries}.items() <= {e.key: e.id for e in here.entries}.items()
    assert all(0 <= e.id < 1 << 63 for e in here.entries)
    assert sample_id("bee/001.jpg") == 4103319333615632164  # frozen: ids identify images in checkpoints and records


def test_colliding_ids_are_an_error(image_folder, monkeypatch):
    monkeypatch.setattr(entries, "sample_id", lambda key: 1)
    with pytest.raises(UserError, match=r"ant/000\.jpg and ant/003\.jpg have the same id by chance"):
        open_folder(image_folder)
