"""A source that changes between two calls, or under the tasks of one: no dataset is a mixture of two listings."""

import json
import sys

import pytest

from data_sharding.errors import UserError
from data_sharding.format.manifest import Manifest
from data_sharding.write import build, shard_task
from data_sharding.write.images import write_dataset
from tests.support.written_datasets import make_images

OPTIONS = {"max_tokens": 16, "images_per_shard": 2, "workers": 1, "progress": False}


@pytest.fixture
def killed_after(monkeypatch):
    """The next call ends after so many shards."""

    def kill(count: int) -> None:
        def run_tasks(tasks, write_shard, *_):
            for task in tasks[:count]:
                write_shard(task, lambda *_: None)
            monkeypatch.undo()
            sys.exit("killed")

        monkeypatch.setattr(build, "run_tasks", run_tasks)

    return kill


def test_nothing_written_yet_may_begin_with_another_source(tmp_path, killed_after):
    src, dst = str(tmp_path / "images"), str(tmp_path / "set")
    make_images(tmp_path / "images", 6)
    killed_after(0)
    with pytest.raises(SystemExit):
        write_dataset(src, dst, **OPTIONS)
    assert json.loads((tmp_path / "set/parts/options.json").read_bytes())["max_tokens"] == 16
    (tmp_path / "images/ant/000.jpg").unlink()
    report = write_dataset(src, dst, **OPTIONS | {"max_tokens": 25})
    assert report.images == 5 and Manifest.load(dst).header.max_tokens == 25


def test_after_a_shard_another_source_is_refused_with_the_way_out(tmp_path, killed_after):
    src, dst = str(tmp_path / "images"), str(tmp_path / "set")
    make_images(tmp_path / "images", 6)
    killed_after(1)
    with pytest.raises(SystemExit):
        write_dataset(src, dst, **OPTIONS)
    moved = (tmp_path / "images/ant/000.jpg").rename(tmp_path / "000.jpg")
    with pytest.raises(UserError, match=rf"was started with another source .*or remove it \(rm -r {dst}\)"):
        write_dataset(src, dst, **OPTIONS)
    with pytest.raises(UserError, match=rf"if the source has changed since, remove it first: rm -r {dst}"):
        Manifest.load(dst)
    moved.rename(tmp_path / "images/ant/000.jpg")
    assert write_dataset(src, dst, **OPTIONS).images == 6
    (tmp_path / "images/ant/000.jpg").unlink()
    with pytest.raises(UserError, match="was started with another source .*, or give another folder$"):
        write_dataset(src, dst, **OPTIONS)  # a finished dataset is worth more: nobody is told to remove it


LATE = "1 of the 3 shards of .* were written from another listing of .*remove"


@pytest.mark.parametrize("at_once, refused", [(True, "another task has started .*/set with other opt"), (False, LATE)])
def test_tasks_that_saw_different_listings_write_no_dataset(tmp_path, monkeypatch, at_once, refused):
    """Two tasks list the source at the same time, and a file is added in between. The one that finds the options of the
    other is refused; so is, by the records of the shards, one that could not look."""
    if not at_once:
        monkeypatch.setattr(shard_task, "_require_begun", lambda task: None)
    src, dst = str(tmp_path / "images"), str(tmp_path / "set")
    make_images(tmp_path / "images", 5)
    honest, honest_commit = build.run_tasks, build._commit

    def other_task_first(tasks, write_shard, workers, progress):
        monkeypatch.setattr(build, "run_tasks", lambda tasks, work, *_: work(tasks[0], lambda *_: None))
        monkeypatch.setattr(build, "_commit", lambda *_: None)
        make_images(tmp_path / "images", 6)
        build.build(src, dst, *others)
        monkeypatch.setattr(build, "run_tasks", honest)
        monkeypatch.setattr(build, "_commit", honest_commit)
        todo = [task for task in tasks if not build.exists(task.part)]
        honest(todo, write_shard, workers, progress)

    seen = []
    with monkeypatch.context() as patch:
        patch.setattr("data_sharding.write.images.build", lambda *arguments: seen.append(arguments) or 0)
        patch.setattr("data_sharding.write.images.report", lambda *_: None)
        make_images(tmp_path / "images", 6)
        write_dataset(src, dst, **OPTIONS)
    others = seen[0][2:]
    (tmp_path / "images/cow/005.jpg").unlink()
    monkeypatch.setattr(build, "run_tasks", other_task_first)
    with pytest.raises(UserError, match=refused):
        write_dataset(src, dst, **OPTIONS)
    assert not (tmp_path / "set/manifest.json").exists()
