"""verify finds each kind of damage, and all of it; inspect counts the dataset."""

import json
import os
import shutil

import numpy as np
import pytest
import xxhash

from data_sharding import verify as module
from data_sharding.format.manifest import Manifest
from data_sharding.inspect import inspect, save_picture, to_text
from data_sharding.verify import verify
from tests.support import samples
from tests.support.samples import put_at, rewrite, write_samples


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    return path, write_samples(str(path))


@pytest.fixture
def dataset(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "set")
    return tmp_path / "set"


def test_a_whole_dataset_has_no_problems(dataset):
    report = verify(str(dataset))
    assert report.problems == ()
    assert (report.shards, report.samples) == (3, 116)
    assert report.bytes == sum(file.stat().st_size for file in dataset.glob("*.zst"))
    assert report.mb_per_second > 0


def test_a_flipped_byte_is_found_wherever_it_is(dataset):
    """One bit in each of 40 places, the first and last byte of the file among them."""
    shard = dataset / "shard-000000.tar.zst"
    data = shard.read_bytes()
    for at in np.linspace(0, len(data) - 1, 40).astype(int):
        damaged = bytearray(data)
        damaged[at] ^= 1
        shard.write_bytes(damaged)
        problems = verify(str(dataset)).problems
        assert len(problems) == 1 and "shard-000000.tar.zst" in problems[0], at


def test_a_truncated_shard_is_found(dataset):
    shard = dataset / "shard-000000.tar.zst"
    data = shard.read_bytes()
    manifest = Manifest.load(str(dataset))
    boundary = int(manifest.frame_offset[1])  # at the end of a frame, where a zstd reader notices nothing
    for size in (len(data) - 1, boundary, boundary - 1, 0):
        shard.write_bytes(data[:size])
        problems = verify(str(dataset)).problems
        assert any(f"is {size} bytes long, not {len(data)}" in p for p in problems)
        lost = int((manifest.frame_offset + manifest.frame_bytes > size)[manifest.frame_shard == 0].sum())
        assert len(problems) == lost + 1


def test_a_longer_or_foreign_shard_is_found(dataset):
    with open(dataset / "shard-000002.tar.zst", "ab") as file:
        file.write(b"x")
    shutil.copy(dataset / "shard-000001.tar.zst", dataset / "shard-000009.tar.zst")
    stray, longer = verify(str(dataset)).problems
    assert "shard-000009.tar.zst is not in the manifest" in stray
    assert "shard-000002.tar.zst is" in longer and "bytes long" in longer


def test_a_shard_without_its_end_is_found_even_if_the_manifest_says_so(dataset):
    """`tar` reports such a file as an error, although every digest matches."""
    shard = dataset / "shard-000002.tar.zst"
    manifest = Manifest.load(str(dataset))
    data = shard.read_bytes()[: manifest.frame_offset[-1] + manifest.frame_bytes[-1]]
    shard.write_bytes(data)
    header = json.loads((dataset / "manifest.json").read_bytes())
    header["totals"]["bytes"] += len(data) - header["shards"][2]["bytes"]
    header["shards"][2] |= {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    (dataset / "manifest.json").write_text(json.dumps(header))
    assert ["not the end of a tar archive" in problem for problem in verify(str(dataset)).problems] == [True]


def test_a_missing_shard_is_found_and_the_others_are_read(dataset):
    (dataset / "shard-000000.tar.zst").unlink()
    report = verify(str(dataset))
    assert len(report.problems) == 1 and "shard-000000.tar.zst is missing" in report.problems[0]
    assert report.bytes == sum(file.stat().st_size for file in dataset.glob("*.zst")) > 0


@pytest.mark.parametrize(
    ("column", "edit", "message"),
    [
        ("sample_id", put_at(0, 7), "disagree with the manifest's sample_id"),
        ("label", put_at(0, 2), "disagree with the manifest's label"),
        ("size", put_at((0, 0), 3), "disagree with the manifest's size"),
        ("frame_digest", put_at((0, 0), 1), "do not match their digest"),
        ("frame_raw_bytes", put_at(0, 512), "are not one whole frame of 512 raw bytes"),
    ],
)
def test_a_manifest_that_disagrees_with_its_shards_is_found(dataset, column, edit, message):
    rewrite(dataset, **{column: edit})
    problems = verify(str(dataset)).problems
    assert len(problems) == 1 and message in problems[0] and "frame 0" in problems[0]


def test_a_manifest_that_disagrees_with_itself_is_found(dataset):
    rewrite(dataset, label=put_at(0, 99))
    assert ["label.npy" in problem for problem in verify(str(dataset)).problems] == [True]


def test_a_digest_of_the_whole_shard_counts_too(dataset):
    header = json.loads((dataset / "manifest.json").read_bytes())
    header["shards"][1]["xxh3_128"] = "0" * 32
    (dataset / "manifest.json").write_text(json.dumps(header))
    assert ["digest in the manifest" in problem for problem in verify(str(dataset)).problems] == [True]


def test_duplicate_ids_are_found(tmp_path, monkeypatch):

    honest = samples.make_sample
    monkeypatch.setattr(samples, "make_sample", lambda i: honest(i if i != 5 else 4))
    write_samples(str(tmp_path), (8,))
    problems = verify(str(tmp_path)).problems
    assert len(problems) == 1 and "occurs 2 times" in problems[0] and f"{1000 + (4 << 50):016x}" in problems[0]


def test_all_problems_are_collected(dataset):
    (dataset / "shard-000001.tar.zst").unlink()
    shard = dataset / "shard-000002.tar.zst"
    data = bytearray(shard.read_bytes())
    data[100] ^= 255
    data[-100_000] ^= 255
    shard.write_bytes(data)
    problems = verify(str(dataset)).problems
    assert len(problems) == 3


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_several_processes_find_the_same(dataset, monkeypatch):
    """As on a large dataset: whole, then with a shard missing, one truncated and one with a flipped byte."""
    alone = [verify(str(dataset))]
    monkeypatch.setattr(module, "_WORTH_PROCESSES", 0)
    monkeypatch.setattr(module, "_verify_shard", lambda *_: pytest.fail("that is for the other processes"))
    together = [verify(str(dataset))]
    monkeypatch.undo()
    (dataset / "shard-000001.tar.zst").unlink()
    for name, change in (("0", lambda data: data[:-100_000]), ("2", lambda data: data[:500] + b"x" + data[501:])):
        shard = dataset / f"shard-00000{name}.tar.zst"
        shard.write_bytes(change(shard.read_bytes()))
    alone.append(verify(str(dataset)))
    monkeypatch.setattr(module, "_WORTH_PROCESSES", 0)
    together.append(verify(str(dataset)))
    assert [r.problems for r in together] == [r.problems for r in alone]
    assert [r.bytes for r in together] == [r.bytes for r in alone]
    assert alone[0].problems == () and len(alone[1].problems) >= 4


@pytest.mark.parametrize("span", [1, 3 << 20])
def test_any_span_finds_the_same(dataset, monkeypatch, span):
    monkeypatch.setattr(module, "_SPAN", span)
    assert verify(str(dataset)).problems == ()
    test_all_problems_are_collected(dataset)


def test_no_dataset_is_a_problem_not_a_crash(tmp_path):
    assert "there is no dataset" in verify(str(tmp_path)).problems[0]


def test_inspect_counts_the_dataset(whole, tmp_path):
    path, samples = whole
    figures = json.loads(json.dumps(inspect(str(path))))  # all of it is JSON
    assert figures["samples"] == len(samples) and sum(figures["images_per_class"].values()) == len(samples)
    assert figures["images_per_class"]["eel"] == sum(s.label == 2 for s in samples)
    lengths = {v: [np.prod(s.views[v].shape[1:3]) for s in samples if v in s.views] for v in ("resize", "crop")}
    for view, of in figures["lengths"].items():
        assert of["images"] == len(lengths[view]) == sum(of["counts"])
        assert of["mean"] == pytest.approx(np.mean(lengths[view]))
        assert (of["min"], of["max"]) == (min(lengths[view]), max(lengths[view]))
    mixed = [np.mean([np.prod(a.shape[1:3]) for a in s.views.values()]) for s in samples]
    assert figures["mean_length_mixed"] == pytest.approx(np.mean(mixed))
    text = to_text(figures)
    assert "116 images of 3 classes" in text and "█" in text
    pytest.importorskip("matplotlib")
    save_picture(figures, str(tmp_path / "lengths.png"))
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
