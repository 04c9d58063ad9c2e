"""`fitv2 bench checkpoint`: the report holds what it promises, and nothing is left behind."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_sharding.storage.filesystems import disconnect
from fitv2_scale.bench import checkpoint
from fitv2_scale.bench.checkpoint_report import to_text
from fitv2_scale.bench.reshard import reshard_commit
from fitv2_scale.checkpoint.checkpointer import Checkpointer
from fitv2_scale.checkpoint.commit import verify_commit
from fitv2_scale.checkpoint.restore import restore
from fitv2_scale.checkpoint.staging import Staging
from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.load import load_config
from fitv2_scale.run.run import Run
from tests.support.checkpoint_state import State, opened, saver
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import BENCHED

SPREAD = {"median", "lowest", "highest"}


def measure(folder: str, saves: int, copy: float = 0.0) -> dict | None:
    """``copy``: seconds for which the state is copied once training, or who waits for the save, asks for it."""
    asked = threading.Event()
    Staging.mark = preceded(Staging.mark, asked.clear)
    Staging.wait = preceded(Staging.wait, asked.set)
    Checkpointer.finish_save = preceded(Checkpointer.finish_save, asked.set)
    Staging.copy = preceded(Staging.copy, lambda: asked.wait() and time.sleep(copy))
    return checkpoint.measure(load_config("configs/demo.yaml", BENCHED), saves, folder)


def preceded(method: Callable, act: Callable[[], object]) -> Callable:
    return lambda *args, **kw: (act(), method(*args, **kw))[1]


def test_the_report_and_what_is_left(tmp_path):
    """Two ranks; the stall is what the slow copy holds up, the saves are as long as they are, nothing stays."""
    report, other = run_ranks(2, measure, str(tmp_path), 2, 0.3)
    assert other is None and report["ranks"] == 2 and report["rounds"] == 2 and report["storage"] == "local"
    assert set(report["stall_seconds"]) == {"first", *SPREAD}
    spreads = [value for value in report.values() if isinstance(value, dict) and value.keys() >= SPREAD]
    assert len(spreads) == 14
    assert all(0 < value["lowest"] <= value["median"] <= value["highest"] for value in spreads)
    assert report["stall_seconds"]["lowest"] > 0.3 and report["blocking_seconds"]["lowest"] > 0.3
    assert report["durable_seconds"]["lowest"] > 0.3
    parameters = 2 * 32 * 32  # more than that
    assert report["bytes"] > 16 * parameters
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    assert "stall" in to_text(report) and json.dumps(report)


def measure_on_s3(env: dict[str, str], url: str) -> dict | None:
    os.environ.update(env)
    disconnect()
    return measure(url, 1)


@pytest.mark.s3
def test_on_s3(rgw, client):
    client.create_bucket(Bucket="bench")
    report, _ = run_ranks(2, measure_on_s3, rgw.environment, "s3://bench/here/")
    assert report["storage"] == "s3" and report["share_of_plain"]["lowest"] > 0
    assert "Contents" not in client.list_objects_v2(Bucket="bench")


def resharded(url: str, ranks: int) -> None:
    with opened({}, f"{url}/one") as (world, run):
        assert saver(world, run)(3) is None
        (entry,) = run.log.commits()
        other = Run.open_or_create(f"{url}/other", {}, {}, None)
        reshard_commit(run, entry, other, ranks)
        (entry,) = other.log.commits()
        assert verify_commit(other, entry) == []
        state = State(-1, world)
        assert restore(state, other, world).step == 3 and state.is_whole(3)
        assert entry.fields["path"] == "steps/00000003.0001"
        assert len(list(Path(url, "other", entry.fields["path"]).glob("*.safetensors"))) == ranks


@pytest.mark.parametrize("ranks", [1, 3, 9])  # of tensors with 50 and 7 rows
def test_a_commit_laid_out_anew_is_the_same(tmp_path, ranks):
    run_ranks(1, resharded, str(tmp_path), ranks)


@pytest.mark.parametrize(
    "options,message",
    [
        (["--s3", "bucket/folder"], "--s3 bucket/folder: give s3://BUCKET/FOLDER"),
        (["--saves", "0"], "--saves 0: give at least 1"),
    ],
)
def test_bad_input_is_one_sentence(options, message, capsys):
    assert main(["bench", "checkpoint", "configs/demo.yaml", *options]) == 2
    assert capsys.readouterr().err == f"fitv2: {message}\n"
