"""Writing in several processes, or tasks of a Slurm job, any of which may die: the same bytes as from one."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_sharding import worker_pool
from data_sharding.storage.byte_ranges import ByteRange
from data_sharding.write import build, cleanup, image_sources, images, shard_task
from data_sharding.write.entries import ImageFile
from data_sharding.write.findings import Skipped
from data_sharding.write.image_sources import open_folder
from data_sharding.write.images import write_dataset
from tests.support.repository import ROOT
from tests.support.waiting import wait
from tests.support.written_datasets import OPTIONS, bytes_of, children, kill_when, make_images


def test_two_processes_write_the_same_bytes_as_one(image_folder, written_dataset, tmp_path):
    write_dataset(image_folder, str(tmp_path / "set"), workers=2, **OPTIONS)
    assert bytes_of(tmp_path / "set") == bytes_of(written_dataset[0])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_twice_and_started_again_it_writes_the_same_bytes(tmp_path):
    make_images(tmp_path / "images", 48, side=200)  # large enough that a shard takes a while
    src, dst = str(tmp_path / "images"), tmp_path / "set"
    options = {**OPTIONS, "images_per_shard": 3}
    write_dataset(src, str(tmp_path / "whole"), workers=1, **options)
    arguments = f"{src!r}, {str(dst)!r}, workers=2, **{options}"
    call = f"from data_sharding.write.images import write_dataset; write_dataset({arguments})"
    kept = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", call], cwd=ROOT)
        workers = kill_when(lambda n=kept + 2: len(list(dst.rglob("shard-*.json"))) >= n, process)
        kept = len(list(dst.rglob("shard-*.json")))
        assert workers and not (dst / "manifest.json").exists()
    done_before = {file: file.stat().st_mtime_ns for file in dst.glob("*.tar.zst")}
    (dst / ".shard-000000.tar.zst.0123456789abcdef.tmp").write_bytes(b"what a killed writer leaves")
    report = write_dataset(src, str(dst), workers=1, **options)
    assert report.encoded <= 48 - 3 * kept + 3
    recorded = sum(file.stat().st_mtime_ns == at for file, at in done_before.items())
    assert recorded >= kept - 2  # the holdout's shards lie elsewhere
    assert bytes_of(dst) == bytes_of(tmp_path / "whole")


def test_a_worker_that_is_killed_is_reported_and_nothing_hangs(tmp_path):
    make_images(tmp_path / "images", 24, side=200)
    src, dst = str(tmp_path / "images"), str(tmp_path / "set")
    call = (
        "from data_sharding.errors import UserError\nfrom data_sharding.write.images import write_dataset\n"
        f"try: write_dataset({src!r}, {dst!r}, workers=2, images_per_shard=12, progress=False)\n"
        "except UserError as error: print(error)"
    )
    root = ROOT
    process = subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, text=True, cwd=root)
    # Two workers and multiprocessing's resource tracker.
    wait("workers", lambda: process.poll() is not None or len(children(process.pid)) >= 3)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    assert "a worker process was killed" in process.communicate()[0]


def test_an_error_in_a_worker_keeps_its_traceback(tmp_path, monkeypatch):
    """A file that vanishes while writing is no bad image: it is an error, with the place where it happened."""
    make_images(tmp_path / "images", 3)

    def and_then_one_vanishes(src):
        source = image_sources.open_source(src)
        (tmp_path / "images/bee/001.jpg").unlink()
        return source

    monkeypatch.setattr(images, "open_source", and_then_one_vanishes)
    with pytest.raises(FileNotFoundError) as error:
        write_dataset(str(tmp_path / "images"), str(tmp_path / "set"), workers=2, images_per_shard=1, progress=False)
    assert "write_shard" in "".join(error.value.__notes__)


# ---- several Slurm tasks ----


def start_task(call: str, place: int, count: int) -> subprocess.Popen:
    env = os.environ | {"SLURM_PROCID": str(place), "SLURM_NTASKS": str(count)}
    return subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, env=env)


def slurm_call(src, dst, **options) -> str:
    arguments = f"{str(src)!r}, {str(dst)!r}, **{options}"
    return f"from data_sharding.write.images import write_dataset; write_dataset({arguments})"


def test_each_task_begins_with_its_own_shards_and_ends_with_the_others(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "3")
    turns = []
    for place in range(3):
        monkeypatch.setenv("SLURM_PROCID", str(place))
        turns.append(worker_pool.order_for_slurm_task(list(range(8))))
    assert turns == [[0, 3, 6, 7, 4, 1, 5, 2], [1, 4, 7, 5, 2, 6, 3, 0], [2, 5, 6, 3, 0, 7, 4, 1]]
    monkeypatch.delenv("SLURM_PROCID")
    monkeypatch.delenv("SLURM_NTASKS")
    assert worker_pool.order_for_slurm_task(list(range(8))) == list(range(8))


def test_a_task_that_dies_leaves_its_shards_to_the_others(tmp_path):
    """Three tasks, one killed in the middle: the others finish, and the bytes are those of one process."""
    make_images(tmp_path / "images", 45, side=200)
    options = {**OPTIONS, "images_per_shard": 3, "workers": 1}
    write_dataset(str(tmp_path / "images"), str(tmp_path / "whole"), **options)
    dst = tmp_path / "set"
    tasks = [start_task(slurm_call(tmp_path / "images", dst, **options), place, 3) for place in range(3)]
    wait("a shard", lambda: list(dst.rglob("shard-*.json")))
    assert tasks[1].poll() is None
    tasks[1].kill()
    assert [task.wait() for task in tasks] == [0, -signal.SIGKILL, 0]
    assert_same_dataset(dst, tmp_path / "whole")


def assert_same_dataset(dst: Path, whole: Path) -> None:
    """A task that finishes just after another may leave a record; the next call removes it."""
    found = {name: data for name, data in bytes_of(dst).items() if not name.startswith(("parts/", "holdout/parts/"))}
    assert found == bytes_of(whole)


def test_a_wrong_number_of_tasks_does_no_harm(image_folder, written_dataset, tmp_path):
    """SLURM_NTASKS is set in a batch script too, where one process runs alone."""
    task = start_task(slurm_call(image_folder, tmp_path / "set", workers=1, **OPTIONS), 3, 4)
    assert task.wait() == 0
    assert bytes_of(tmp_path / "set") == bytes_of(written_dataset[0])


def begun(dst: Path) -> None:
    """The record that a task finds if all have the options b""."""
    shard_task.put(f"{dst}/parts/options.json", b"")


def test_work_on_a_shard_ends_when_another_task_has_it(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_task, "_CHUNK", 2)
    entries = open_folder(image_folder).entries[:6]
    seen, reported = [], []

    def make(items):
        seen.extend(items)
        if len(seen) == 4:
            shard_task.put(task.part, b"{}")
        return [Skipped(item.key, "for the test") for item in items]

    begun(tmp_path)
    task = shard_task.ShardTask(
        str(tmp_path), str(tmp_path), "shard-000000.tar.zst", entries, ("ant",), make, "digest", b""
    )
    shard_task.write_shard(task, lambda count, fresh: reported.append((count, fresh)))
    assert len(seen) == 4 and reported == [(2, True), (2, True), (2, False)]
    assert Path(task.part).read_bytes() == b"{}"


def test_a_task_that_comes_last_to_commit_finds_it_done(image_folder, written_dataset, tmp_path, monkeypatch):
    """Another one has committed and cleaned up between its last shard and its own commit."""
    honest = build._commit

    def beaten(src, datasets, *rest):
        honest(src, datasets, *rest)
        for url in datasets:
            cleanup.clean(url)
        honest(src, datasets, *rest)

    monkeypatch.setattr(build, "_commit", beaten)
    report = write_dataset(image_folder, str(tmp_path / "set"), workers=1, **OPTIONS)
    assert (report.images, report.held_out) == (54, 6)
    assert bytes_of(tmp_path / "set") == bytes_of(written_dataset[0])


def test_a_shard_finished_after_the_commit_leaves_no_record(tmp_path):
    def make(items):
        shard_task.put(f"{tmp_path}/manifest.json", b"{}")  # another task commits meanwhile
        shutil.rmtree(tmp_path / "parts")
        return [Skipped(item.key, "for the test") for item in items]

    begun(tmp_path)
    item = ImageFile(1, "ant/1.jpg", 0, ByteRange("", None, 0))
    task = shard_task.ShardTask(str(tmp_path), str(tmp_path), "shard-000000.tar.zst", (item,), (), make, "digest", b"")
    shard_task.write_shard(task, lambda *_: None)
    assert list(tmp_path.iterdir()) == [tmp_path / "manifest.json"]
