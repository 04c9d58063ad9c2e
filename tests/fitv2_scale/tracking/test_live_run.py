"""What of a run is live in MLflow: its attempts' child runs, and the tags by which runs are found."""

import json
import sqlite3
from pathlib import Path

import pytest
import yaml

from data_sharding.storage.local_store import LocalStore
from fitv2_scale.run.run import Run
from fitv2_scale.tracking.destination import resolve_uri
from fitv2_scale.tracking.journal import Journal
from fitv2_scale.tracking.live_run import KEYS, STATE
from fitv2_scale.tracking.publisher import Publisher
from fitv2_scale.tracking.sync import sync
from fitv2_scale.tracking.tags import family
from tests.support.journal_writers import make, train
from tests.support.mlflow_queries import contents, published, steps
from tests.support.repository import ROOT


def children(run_folder: Path) -> list[dict]:
    """The child runs of the run at ``folder``, oldest first."""
    run = Run.open(str(run_folder))
    with sqlite3.connect(run_folder.parent / "mlflow.db", timeout=60) as db:
        uuids = db.execute(
            "select run_uuid, value from tags where key = 'fitv2.live_id' and value like ?", (f"{run.id}/%",)
        )
        return [contents(db, uuid) for uuid, _ in sorted(uuids, key=lambda row: int(row[1].rpartition("/")[2]))]


def points(child: dict, key: str) -> list[tuple[int, float]]:
    return [(step, value) for step, name, value, _, _ in child["metrics"] if name == key]


def test_a_child_run_shows_what_is_live(run_folder):
    """Every tenth record, uncommitted ones included, six keys at most; one child an attempt, closed with it."""
    run = make(run_folder)
    train(run, 0, 45, commits=(20,))
    sync(str(run_folder), "auto", "test")
    assert published(run_folder)["tags"]["fitv2.lag"] == "25 steps: 45 measured, 20 committed"
    attempt = run.claim({})
    log = Journal(attempt.folder, 2, 20)
    for step in range(21, 33):
        log.metrics(step, {name: float(step) for name in (*KEYS, "odd")})
        log.metrics(step, {"validation": 1.0})  # counts for nothing
    log.seal()
    Publisher(run, resolve_uri(str(run_folder), "auto"), "test", print).publish()
    first, second = children(run_folder)
    assert points(first, "loss") == [(s, 1 + s / 1000) for s in (1, 11, 21, 31, 41)]
    assert points(first, "lag_steps") == [(1, 1), (11, 11), (21, 1), (31, 11), (41, 21)]
    assert {row[1] for row in second["metrics"]} == {*KEYS, "lag_steps"} and len({*KEYS}) < 6
    assert points(second, "mfu") == [(21, 21.0), (31, 31.0)]
    parent = json.loads((run_folder / "tracking" / "mlflow.json").read_bytes())["mlflow_run"]
    for child, number, status in [(first, 1, "KILLED"), (second, 2, "RUNNING")]:
        assert child["tags"]["mlflow.parentRunId"] == parent and child["tags"]["fitv2.attempt"] == str(number)
        assert child["status"] == status
    attempt.end(1, "a bug")
    sync(str(run_folder), "auto", "test")
    assert [child["status"] for child in children(run_folder)] == ["KILLED", "FAILED"]
    assert steps(run_folder) == list(range(1, 21))


def test_a_child_run_continues_where_it_was(run_folder, monkeypatch):
    """Killed before or after it wrote down what it sent, its uploader repeats no point and skips none."""
    run, put_json = make(run_folder), LocalStore.put_json

    def killed(store: LocalStore, path: str, value: dict) -> None:
        if path == STATE:
            raise KeyboardInterrupt
        put_json(store, path, value)

    attempt = run.claim({})
    log = Journal(attempt.folder, 1, 0)
    for step in range(1, 101):
        log.metrics(step, {"loss": float(step)})
        if step % 7 == 0:
            log.seal()  # the live reader sees sealed segments and growing ones alike
        if step in (33, 66):
            monkeypatch.setattr(LocalStore, "put_json", killed)
            with pytest.raises(KeyboardInterrupt):
                sync(str(run_folder), "auto", "test")
            monkeypatch.setattr(LocalStore, "put_json", put_json)
        if step in (34, 90):
            sync(str(run_folder), "auto", "test")
    log.seal()
    attempt.end(0, "done")
    sync(str(run_folder), "auto", "test")
    (child,) = children(run_folder)
    assert points(child, "loss") == [(s, float(s)) for s in range(1, 101, 10)] and child["status"] == "FINISHED"


TAGS = ("family", "network", "parameters", "dataset", "seed", "git", "gpu")


def test_tags_group_runs(run_folder):
    run = make(run_folder, {"model": {"depth": 40, "hidden": 2304, "heads": 24}, "seed": 7})
    gpus = [{"name": "NVIDIA H200", "uuid": str(i)} for i in range(8)]
    run.claim({"git": "0c9d", "gpus": gpus, "parameters": 2971928080, "datasets": ["5f", "6e"]})
    sync(str(run_folder), "auto", "test")
    tags = published(run_folder)["tags"]
    assert {name: tags[f"fitv2.{name}"] for name in TAGS} == {
        "family": "3B/2", "network": "FiTv2-3B/2", "parameters": "2971928080", "dataset": "5f,6e", "seed": "7",
        "git": "0c9d", "gpu": "8 x NVIDIA H200",
    }  # fmt: skip


def test_families_are_those_of_the_configs():
    named = {"s2": "S/2", "b2": "B/2", "l2": "L/2", "xl2": "XL/2", "3b2": "3B/2", "demo": "6x160"}
    configs = ROOT / "configs"
    for name, expected in named.items():
        (file,) = configs.glob(f"*{'fitv2_' if name != 'demo' else ''}{name}.yaml")
        assert family(yaml.safe_load(file.read_text())["model"]) == expected
