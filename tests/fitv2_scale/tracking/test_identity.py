"""A run folder has one MLflow run: the same after a move, its own after a copy, in a folder of any name."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from fitv2_scale.cli.__main__ import main
from fitv2_scale.evaluate.mlflow_upload import publish
from fitv2_scale.run.run import Run
from fitv2_scale.tracking.destination import notes_at_start
from fitv2_scale.tracking.identity import published
from fitv2_scale.tracking.sync import sync
from tests.support.journal_writers import make, train
from tests.support.mlflow_queries import contents


def in_mlflow(database: Path, run_id: str) -> list[dict]:
    """The MLflow runs that have, or begin with, this fitv2.run_id."""
    with sqlite3.connect(database, timeout=60) as db:
        query = "select run_uuid from tags where key = 'fitv2.run_id' and value like ? order by length(value)"
        return [contents(db, uuid) for (uuid,) in db.execute(query, (f"{run_id}%",))]


def points(run: dict) -> list[tuple[int, int]]:
    return [(row[0], int(row[2])) for row in run["metrics"]]


def copied(first: Path, second: Path) -> Path:
    shutil.copytree(first, second)
    return second


def test_a_copy_gets_an_mlflow_run_of_its_own(run_folder, runs):
    run = make(run_folder, {"run": str(run_folder), "tracking": {"uri": "auto"}})
    train(run, 0, 5, commits=(5,)).end(75, "SIGTERM")
    sync(str(run_folder), "auto", "test")
    second = Run.open(str(copied(run_folder, runs / "second")))
    (note,) = notes_at_start(second, "auto", "test")
    assert note == f"{second.url} is a copy of {run.url}: it gets an MLflow run of its own"
    assert notes_at_start(run, "auto", "test") == []
    assert "MLflow does not know the run yet" in publish(second, [])  # `fitv2 evaluate` would write into the first

    train(run, 5, 7, commits=(7,)).end(0, "done")
    train(second, 5, 8, commits=(8,)).end(0, "done")
    said: list[str] = []
    for folder in (run_folder, second.url, run_folder, second.url):
        sync(str(folder), "auto", "test", say=said.append)
    assert said == [note]  # once
    original, copy = in_mlflow(runs / "mlflow.db", run.id)
    assert points(original) == [(step, 1 if step <= 5 else 2) for step in range(1, 8)]
    assert points(copy) == [(step, 1 if step <= 5 else 2) for step in range(1, 9)]
    assert original["tags"]["fitv2.run_id"] == run.id == copy["tags"]["fitv2.copy_of"]
    assert copy["tags"]["fitv2.run_id"].startswith(f"{run.id}-copy-") and "fitv2.copy_of" not in original["tags"]

    third = Run.open(str(copied(Path(second.url), runs / "third")))  # of a copy
    assert published(third).copied_from == second.url
    assert "MLflow: 0 metrics in run" in publish(second, [])


@pytest.mark.parametrize("how", [shutil.move, lambda first, second: first.rename(second)])
def test_a_moved_run_stays_the_same_mlflow_run(run_folder, runs, tmp_path, how: Callable):
    run = make(run_folder, {"run": str(run_folder)})
    train(run, 0, 5, commits=(5,)).end(75, "SIGTERM")
    first = sync(str(run_folder), "auto", "test")
    elsewhere = runs / "sub" / run_folder.name
    elsewhere.parent.mkdir(exist_ok=True)
    how(run_folder, elsewhere)
    moved = Run.open(str(elsewhere))
    (note,) = notes_at_start(moved, "auto", "test")
    assert note == f"{elsewhere} was at {run_folder} before: it stays the same MLflow run"
    train(moved, 5, 7, commits=(7,)).end(0, "done")
    again = sync(moved.url, "auto", "test")
    assert (again["mlflow_run"], again["uri"], again["metrics"]) == (first["mlflow_run"], first["uri"], 2)
    assert notes_at_start(moved, "auto", "test") == []
    (only,) = in_mlflow(runs / "mlflow.db", run.id)
    assert [step for step, _ in points(only)] == list(range(1, 8))


def test_another_name_of_the_same_folder_is_no_copy(run_folder, runs):
    run = make(run_folder, {"run": str(run_folder)})
    (runs / "link").symlink_to(run_folder)
    linked = Run.open(str(runs / "link"))
    assert published(linked).copied_from == published(linked).moved_from == published(run).copied_from == ""


@pytest.mark.parametrize("config", [{"run": "made"}, {}])
def test_runs_of_earlier_versions_are_known_by_their_config(tmp_path, monkeypatch, config):
    """They wrote no place into mlflow.json, and the run into run.json as it was typed."""
    monkeypatch.chdir(tmp_path)
    run = make(tmp_path / "made", {})
    record = json.loads((tmp_path / "made/run.json").read_text()) | {"config": config}
    (tmp_path / "made/run.json").write_text(json.dumps(record))
    place = {"uri": "sqlite:///x", "experiment": "test", "mlflow_run": "77"}
    run.store.put_json("tracking/mlflow.json", place)
    known = published(Run.open(str(tmp_path / "made")))
    assert (known.mlflow_run, known.name, known.copied_from, known.moved_from) == ("77", run.id, "", "")
    copy = published(Run.open(str(copied(tmp_path / "made", tmp_path / "copy"))))
    assert copy.copied_from == (str(tmp_path / "made") if config else "")


def test_a_run_in_a_folder_of_any_name_keeps_mlflow_beside_it(tmp_path):
    runs = tmp_path / "50%20off #1?a=b" / "100% ü"
    run = make(runs / "run", {"run": "x"})
    (runs / "run/samples").mkdir()
    (runs / "run/samples/00000002.png").write_bytes(b"picture")
    from fitv2_scale.tracking.journal import Journal

    attempt = run.claim({})
    log = Journal(attempt.folder, 1, 0)
    log.metrics(2, {"loss": 1.0})
    log.picture(2, "samples/00000002.png")
    log.seal()
    attempt.commit(2, "steps/2", "sha256:00")
    attempt.end(0, "done")
    counts = sync(run.url, "auto", "test")
    assert (counts["metrics"], counts["pictures"]) == (1, 1)
    (there,) = in_mlflow(runs / "mlflow.db", run.id)
    assert points(there) == [(2, 1)]
    assert [p.read_bytes() for p in (runs / "mlartifacts").rglob("00000002.png")] == [b"picture"]
    assert {p.name for p in tmp_path.iterdir()} == {"50%20off #1?a=b"} and len([*runs.parent.iterdir()]) == 1


def test_the_experiment_of_the_newest_attempt_gets_the_run(run_folder, runs):
    """...by `fitv2 track sync`, and `fitv2 evaluate` sends its metrics there."""
    run = make(run_folder, {"tracking": {"uri": "none", "experiment": "a"}})
    for until, experiment in ((5, "a"), (8, "b")):
        attempt = train(run, until - 5, until, commits=(until,))
        start = json.loads((attempt.folder / "start.json").read_text())
        start["tracking"] = {"uri": "auto", "experiment": experiment}
        (attempt.folder / "start.json").write_text(json.dumps(start))
        attempt.end(75, "SIGTERM")
        assert "MLflow does not know the run yet" in publish(run, [])
        assert main(["track", "sync", run.url]) == 0
        assert "MLflow: 0 metrics in run" in publish(run, [])
    with sqlite3.connect(runs / "mlflow.db", timeout=60) as db:
        query = """select e.name, t.value from experiments e join runs r using (experiment_id) join tags t
                   using (run_uuid) where t.key = 'fitv2.attempt' and r.run_uuid in
                   (select run_uuid from tags where key = 'fitv2.run_id' and value = ?) order by e.name"""
        assert db.execute(query, (run.id,)).fetchall() == [("a", "1"), ("b", "2")]
    assert main(["track", "sync", run.url, "--experiment", "c"]) == 0
    assert json.loads((run_folder / "tracking/mlflow.json").read_text())["experiment"] == "c"
    assert main(["track", "sync", run.url]) == 0  # again there
    assert json.loads((run_folder / "tracking/mlflow.json").read_text())["experiment"] == "c"


def test_of_two_copies_that_both_were_moved_one_gets_an_mlflow_run_of_its_own(run_folder, runs):
    run = make(run_folder, {"run": str(run_folder)})
    train(run, 0, 5, commits=(5,)).end(75, "SIGTERM")
    first = sync(run.url, "auto", "test")["mlflow_run"]
    second = copied(run_folder, runs / "copied")
    moved = run_folder.rename(runs / "moved")
    assert sync(str(moved), "auto", "test")["mlflow_run"] == first
    assert "MLflow does not know the run yet" in publish(Run.open(str(second)), [])
    own = sync(str(second), "auto", "test")["mlflow_run"]
    assert own != first
    for _ in range(2):
        assert sync(str(moved), "auto", "test")["mlflow_run"] == first
        assert sync(str(second), "auto", "test")["mlflow_run"] == own
    again = moved.rename(runs / "again")
    assert sync(str(again), "auto", "test")["mlflow_run"] == first
    assert in_mlflow(runs / "mlflow.db", run.id)[1]["tags"]["fitv2.copy_of"] == run.id
