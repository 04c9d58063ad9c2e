"""All tasks that write one dataset have the same options, classes and program; and a shard's record describes its file.

What old versions recorded is written down here, with its digest.
"""

import json
import sys
from hashlib import blake2b
from pathlib import Path

import pytest

from data_sharding.errors import DataError, UserError
from data_sharding.format import shard
from data_sharding.verify import verify
from data_sharding.write import begun, build, shard_task
from data_sharding.write.begun import Options, begin
from data_sharding.write.images import write_dataset
from data_sharding.write.import_latents import import_dataset
from data_sharding.write.shard_task import ShardTask, write_shard
from tests.support.published_latents import OPTIONS as IMPORTING
from tests.support.published_latents import write_layout
from tests.support.written_datasets import make_images

OPTIONS = {"max_tokens": 16, "images_per_shard": 2, "workers": 1, "progress": False}


@pytest.fixture
def killed(monkeypatch):
    """Writing ends after the first shard."""

    def run_tasks(tasks, write, *_):
        write(tasks[0], lambda *_: None)
        monkeypatch.undo()
        sys.exit("killed")

    monkeypatch.setattr(build, "run_tasks", run_tasks)


@pytest.fixture
def unfinished(tmp_path, killed) -> tuple[str, str]:
    """Source and dataset."""
    make_images(tmp_path / "images", 6)
    with pytest.raises(SystemExit):
        write_dataset(str(tmp_path / "images"), str(tmp_path / "set"), **OPTIONS)
    return str(tmp_path / "images"), str(tmp_path / "set")


def test_of_tasks_with_other_options_one_continues(tmp_path):
    """Both start before anything is written, so the second may replace the options; but then the first one stops."""
    dst, shards = str(tmp_path / "set"), {}
    for tokens in (16, 25):
        options = Options("source", "codec", tokens, 2, 0.0, "classes")
        first = begin(dst, options, vae=False)
        task = ShardTask(dst, dst, f"shard-{tokens:06d}.tar.zst", (), (), list, options.digest, first)
        shards[tokens] = task
    with pytest.raises(UserError, match="another task has started .*/set with other options"):
        write_shard(shards[16], lambda *_: None)
    write_shard(shards[25], lambda *_: None)
    with pytest.raises(UserError, match=r"was started with another max_tokens \(25, now 16\).*rm -r"):
        begin(dst, Options("source", "codec", 16, 2, 0.0, "classes"), vae=False)


def test_other_classes_are_refused_finished_or_not(tmp_path, killed):
    src, dst = str(write_layout(tmp_path / "src", "folders")), str(tmp_path / "set")
    with pytest.raises(SystemExit):
        import_dataset(src, dst, **IMPORTING)
    with pytest.raises(UserError, match="was started with another classes"):
        import_dataset(src, dst, **IMPORTING, classes=7)
    import_dataset(src, dst, **IMPORTING)
    with pytest.raises(UserError, match="was started with another classes .*, or give another folder$"):
        import_dataset(src, dst, **IMPORTING, classes=7)


def test_another_program_is_refused_until_its_record_is_removed(unfinished, monkeypatch):
    monkeypatch.setattr(begun, "code_digest", lambda *_: "other")
    with pytest.raises(UserError, match=r"another version of the program \(code is other here and was [0-9a-f]{16}\)"):
        write_dataset(*unfinished, **OPTIONS)
    Path(unfinished[1], "parts/software.json").unlink()
    assert write_dataset(*unfinished, **OPTIONS).images == 6


def test_an_unfinished_dataset_of_an_old_version_is_finished(unfinished):
    """Versions up to 0170e45 recorded neither the classes nor the program."""
    src, dst = unfinished
    parts = Path(dst) / "parts"
    (parts / "software.json").unlink()
    options = json.loads((parts / "options.json").read_text())
    assert list(options) == ["source", "codec", "max_tokens", "images_per_shard", "holdout", "classes"]
    del options["classes"]
    (parts / "options.json").write_text(json.dumps(options))
    digest = blake2b(json.dumps(options).encode(), digest_size=16).hexdigest()
    for file in parts.glob("shard-*"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"options": digest}))
    report = write_dataset(src, dst, **OPTIONS)
    assert (report.images, report.encoded, verify(dst).problems) == (6, 4, ())


def test_shards_without_a_record_are_nobodys(tmp_path):
    make_images(tmp_path / "images", 3)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/shard-000000.tar.zst").write_bytes(b"of a dataset whose manifest was removed")
    with pytest.raises(UserError, match=r"/set holds shards, but no record .*remove it \(rm -r .*/set\)"):
        write_dataset(str(tmp_path / "images"), str(tmp_path / "set"), **OPTIONS)


@pytest.mark.parametrize("record_comes", [True, False])
def test_a_shard_of_other_bytes_has_the_record_of_its_writer(tmp_path, monkeypatch, record_comes):
    """Another task makes other bytes of the same images. It records them while this one waits; or it has died."""
    make_images(tmp_path / "images", 2)
    src, other, dst = (str(tmp_path / name) for name in ("images", "other", "set"))
    name, honest, records = "shard-000000.tar.zst", shard_task.create_once, []

    def create_once(url: str, data: bytes) -> bytes:
        if url == f"{dst}/{name}":
            Path(url).write_bytes(Path(other, name).read_bytes())
        elif url.endswith(".json"):
            records.append(data)
        return honest(url, data)

    monkeypatch.setattr(shard_task, "create_once", create_once)
    with monkeypatch.context() as patch:
        patch.setattr(shard, "LEVEL", shard.LEVEL + 8)
        write_dataset(src, other, **OPTIONS)
    recorded = len(records)
    monkeypatch.setattr(shard_task, "_PATIENCE", 60.0 if record_comes else 0.0)
    record = Path(dst, "parts", f"{name}.json")
    sleep = (lambda seconds: record.write_bytes(records[0])) if record_comes else (lambda seconds: None)
    monkeypatch.setattr(shard_task.time, "sleep", sleep)
    write_dataset(src, dst, **OPTIONS)
    kept = Path(dst, name).read_bytes() == Path(other, name).read_bytes()
    assert (kept, len(records) - recorded) == ((True, 0) if record_comes else (False, 1))
    assert verify(dst).problems == ()


def test_two_records_of_one_shard_must_be_equal(tmp_path):
    options = Options("source", "codec", 16, 2, 0.0, "classes")
    first = begin(str(tmp_path), options, vae=False)
    task = ShardTask(str(tmp_path), str(tmp_path), "shard-000000.tar.zst", (), (), list, options.digest, first)
    honest = shard_task.exists
    with pytest.MonkeyPatch.context() as patch:  # the other one's record comes after the last look
        patch.setattr(shard_task, "exists", lambda url: False if url == task.part else honest(url))
        write_shard(task, lambda *_: None)
        write_shard(task, lambda *_: None)
        Path(task.part).write_text('{"index": {}}')
        with pytest.raises(UserError, match="two tasks have written .*/shard-000000.tar.zst, and differ .*rm -r"):
            write_shard(task, lambda *_: None)


def test_a_damaged_record_is_named_with_what_to_do(unfinished):
    record = Path(unfinished[1], "parts/shard-000000.tar.zst.json")
    record.write_text('{"index": {"name": 3}, "skipped": []}')
    with pytest.raises(DataError, match=r"/parts/shard-000000.tar.zst.json is damaged \(index.name.*; remove it, and"):
        write_dataset(*unfinished, **OPTIONS)
    record.unlink()
    assert write_dataset(*unfinished, **OPTIONS).images == 6
    Path(unfinished[1], "skipped.json").write_text("[3]")
    assert write_dataset(*unfinished, **OPTIONS).images == 6  # nothing was skipped, so it is not read
    Path(unfinished[1], "source.json").write_text('{"seen": {".jpg": "many"}}')
    with pytest.raises(DataError, match=r"source.json is damaged \(seen..jpg: .*; it is only a report: remove it"):
        write_dataset(*unfinished, **OPTIONS)


def test_what_a_killed_writer_had_not_finished_is_removed(tmp_path):
    (tmp_path / "holdout").mkdir()
    unfinished = tmp_path / f"holdout/.shard-000000.tar.zst.{'0a' * 8}.tmp"
    unfinished.write_bytes(b"half")
    begin(str(tmp_path), Options("source", "codec", 16, 2, 0.0, "classes"), vae=False)
    assert not unfinished.exists()


def test_the_bar_begins_where_the_killed_writer_stopped(unfinished, capsys):
    write_dataset(*unfinished, **OPTIONS | {"progress": True})
    assert "6/6 images" in capsys.readouterr().err.split("\r")[-1]
