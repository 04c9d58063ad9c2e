"""Importing the published latents: the same dataset from every layout, killed or not, from one task or several."""

import json
import subprocess
import sys

import numpy as np
import pytest

from data_sharding.format.manifest import Manifest
from data_sharding.storage.files import exists
from data_sharding.stream.frames import read_frame
from data_sharding.verify import verify
from data_sharding.write import archives
from data_sharding.write.entries import sample_id
from data_sharding.write.import_latents import import_dataset
from tests.support.published_latents import GROUPS, OPTIONS, latent, published, shards_of, write_layout
from tests.support.repository import ROOT
from tests.support.written_datasets import bytes_of, kill_when


def test_every_image_is_there_with_both_views_and_both_flips(imported):
    _, dst, report = imported
    files = published()
    assert (report.images, report.skipped, report.encoded, report.shards) == (42, 0, 42, 7)
    manifest = Manifest.load(str(dst))
    assert verify(str(dst)).problems == ()
    assert manifest.header.codec["name"] == "sd-vae" and manifest.header.codec["scale"] == 0.18215
    assert "published" in manifest.header.codec["digest"]
    assert manifest.header.max_tokens == 16 and manifest.header.dtype == "float16" and len(manifest.classes) == 1000
    samples = {s.id: s for f in range(len(manifest.frame_shard)) for s in read_frame(manifest, f)}
    assert samples.keys() == {sample_id(name) for group in GROUPS[:2] for name in files[group]}
    from safetensors.numpy import load

    crops = 0
    for view, group in (("resize", GROUPS[0]), ("resize", GROUPS[1]), ("crop", GROUPS[2])):
        for name, data in files[group].items():
            sample, tensors = samples[sample_id(name)], load(data)
            np.testing.assert_array_equal(sample.views[view], tensors["feature"].astype(np.float16))
            assert sample.label == tensors["label"]
            crops += view == "crop"
    assert sum("crop" in s.views for s in samples.values()) == crops == 12


@pytest.mark.parametrize("layout", ["tar", "gz", "parts"])
def test_packed_or_not_it_is_the_same_dataset(imported, tmp_path, layout):
    src = write_layout(tmp_path / "src", layout)
    report = import_dataset(str(src), str(tmp_path / "set"), **{**OPTIONS, "workers": 2})
    assert report.skipped == 0
    assert shards_of(tmp_path / "set") == shards_of(imported[1])
    assert not list((tmp_path / "set").rglob("parts"))  # the unpacked tars are gone
    again = import_dataset(str(src), str(tmp_path / "set"), **OPTIONS)  # and are not made again
    assert (again.encoded, again.images) == (0, 42)


def test_two_processes_write_the_same_bytes_as_one(imported, tmp_path):
    import_dataset(str(imported[0]), str(tmp_path / "set"), **{**OPTIONS, "workers": 2})
    assert bytes_of(tmp_path / "set") == bytes_of(imported[1])


def test_holdout(imported, tmp_path):
    report = import_dataset(str(imported[0]), str(tmp_path / "set"), **OPTIONS, holdout=0.1)
    assert (report.images, report.held_out) == (38, 4)
    assert verify(str(tmp_path / "set/holdout")).problems == ()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_while_unpacking_and_while_writing_it_writes_the_same_bytes(tmp_path):
    files = published()
    for i in range(300):
        files[GROUPS[1]][f"m{i}.safetensors"] = latent(f"m{i}", 4, 4, 1)
    src, dst = write_layout(tmp_path / "src", "parts", files), tmp_path / "set"
    options = {**OPTIONS, "images_per_shard": 2, "workers": 2}
    import_dataset(str(src), str(tmp_path / "whole"), **options)
    # Slow enough to be killed in the middle: in the first process only, so the second one is as shipped.
    call = (
        "import time\nfrom data_sharding.write import archives\n"
        "class Slow(archives._Joined):\n"
        "    def read(self, *a): time.sleep(0.2); return super().read(*a)\n"
        "archives._BLOCK = 1 << 12\narchives._Joined = Slow\n"
        "from data_sharding.write.import_latents import import_dataset\n"
        f"import_dataset({str(src)!r}, {str(dst)!r}, **{options | {'workers': 1}})"
    )
    kill_when(lambda: list(dst.rglob("*.tmp")), start(call))
    assert list(dst.rglob("*.tmp")) and not (dst / "manifest.json").exists()
    call = (
        "from data_sharding.write.import_latents import import_dataset\n"
        f"import_dataset({str(src)!r}, {str(dst)!r}, **{options})"
    )
    kill_when(lambda: len(list(dst.rglob("shard-*.json"))) > 3, start(call))
    unpacked = {file: file.stat().st_mtime_ns for file in (dst / "parts").rglob("*.tar")}
    assert len(unpacked) == 3 and not (dst / "manifest.json").exists()
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(archives, "run_tasks", lambda *_: pytest.fail("it unpacks again"))
        report = import_dataset(str(src), str(dst), **OPTIONS | {"images_per_shard": 2})
    assert 0 < report.encoded < 342
    assert bytes_of(dst) == bytes_of(tmp_path / "whole")


def start(call: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", call], cwd=ROOT)


def test_slurm_tasks_share_the_unpacking_and_take_over_what_one_leaves(imported, tmp_path, monkeypatch):
    """Task 1 of 2 unpacks its own archive; it waits for those of the others until their heartbeat stops."""
    src, dst = write_layout(tmp_path / "src", "gz"), str(tmp_path / "set")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setattr(archives, "_TAKEOVER", 0.5)
    waited = []
    plain = archives._unpacked_by_another
    monkeypatch.setattr(archives, "_unpacked_by_another", lambda archive: waited.append(archive.name) or plain(archive))
    import_dataset(str(src), dst, **OPTIONS)
    assert waited == [GROUPS[0], GROUPS[2]]
    assert shards_of(tmp_path / "set") == shards_of(imported[1])


def test_waiting_for_an_archive_ends_when_it_is_there(tmp_path):
    archive = archives.Archive("x", (("x", 1),), str(tmp_path / "x.tar"), mine=False)
    (tmp_path / "x.tar").write_bytes(b"unpacked by another")
    archives._unpack(archive, lambda *_: None)
    assert (tmp_path / "x.tar").read_bytes() == b"unpacked by another"


def test_the_command(tmp_path, capsys):
    from fitv2_scale.cli.__main__ import main

    files = published()
    files[GROUPS[0]]["bad.safetensors"] = b"\x00"
    src = write_layout(tmp_path / "src", "gz", files)
    assert main(["shard", "import", str(src), str(tmp_path / "set"), "--workers", "1", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["images"] == 42 and "1 of the images cannot be read and were left out" in err
    assert exists(str(tmp_path / "set/skipped.json"))
