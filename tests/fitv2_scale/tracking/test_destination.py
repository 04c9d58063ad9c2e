"""Where a run is published: what the URI, the environment and the run itself say, and what can never work."""

import sqlite3
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
from sqlalchemy.engine import make_url

from fitv2_scale.run.run import Run
from fitv2_scale.tracking.destination import (
    artifact_root,
    deleted_experiment,
    journal_only_reason,
    notes_at_start,
    resolve_uri,
    settings_of,
    sqlite_path,
    sqlite_uri,
    uri_problem,
)

ODD = ["50%20off #1?a=b", "100%", "a b", "ünï", "c#", "what?", "[x]*", "a&b=c", "::"]
VARIABLE = "MLFLOW_TRACKING_URI"


@pytest.mark.parametrize("name", ODD)
def test_a_file_of_any_name_is_where_its_uri_says(name):
    """As MLflow reads it: SQLAlchemy cuts at a ? and takes %20 for a space."""
    file = Path("/runs", name, "mlflow.db")
    url = make_url(sqlite_uri(file))
    assert (url.database, dict(url.query)) == (str(file), {})
    assert sqlite_path(sqlite_uri(file)) == file


@pytest.mark.parametrize("name", ODD)
def test_pictures_lie_beside_a_file_of_any_name(name):
    root = urlsplit(artifact_root(sqlite_uri(Path("/runs", name, "mlflow.db"))))
    assert (root.scheme, url2pathname(root.path)) == ("file", f"/runs/{name}/mlartifacts")
    assert root.query == root.fragment == ""


def test_uris_of_before_stay_the_same():
    assert sqlite_uri(Path("/my runs/ü/mlflow.db")) == "sqlite:////my runs/ü/mlflow.db"


def made(folder: Path, **identity) -> Run:
    run = Run.open_or_create(str(folder), {"run": str(folder)}, {}, None)
    if identity:
        run.store.put_json("tracking/mlflow.json", identity)
    return run


def test_auto_is_where_it_was_then_the_variable_then_a_file(tmp_path, monkeypatch):
    beside = f"sqlite:///{tmp_path}/mlflow.db"
    run = made(tmp_path / "run")
    monkeypatch.delenv(VARIABLE, raising=False)
    assert resolve_uri(run.url, "auto") == beside and notes_at_start(run, "auto", "x") == []
    monkeypatch.setenv(VARIABLE, "http://me:pw@h:5000")
    assert resolve_uri(run.url, "auto") == "http://me:pw@h:5000"
    (note,) = notes_at_start(run, "auto", "x")
    assert note == "metrics go to MLflow at http://[redacted]@h:5000, as MLFLOW_TRACKING_URI says"
    assert resolve_uri(run.url, "http://other") == "http://other" and notes_at_start(run, "http://other", "x") == []

    made(tmp_path / "run", uri="http://first:5000", experiment="x", mlflow_run="1")
    assert resolve_uri(run.url, "auto") == "http://first:5000"
    (note,) = notes_at_start(run, "auto", "x")
    assert "MLflow at http://first:5000, where this run has been published before, not to MLFLOW_TRACKING_URI=" in note
    (tmp_path / "old.db").touch()
    made(tmp_path / "run", uri=f"sqlite:///{tmp_path}/old.db")
    assert resolve_uri(run.url, "auto") == f"sqlite:///{tmp_path}/old.db"
    (tmp_path / "old.db").unlink()  # it was moved, with the run perhaps
    assert resolve_uri(run.url, "auto") == "http://me:pw@h:5000"
    made(tmp_path / "run", uri="http://[redacted]@h:5000")  # a login that only the environment has
    assert resolve_uri(run.url, "auto") == "http://me:pw@h:5000"
    monkeypatch.delenv(VARIABLE)
    assert resolve_uri(run.url, "auto") == beside


A, B, H = ("http://h:5", "a"), ("http://h:5", "b"), ("http://[redacted]@h", "c")


@pytest.mark.parametrize(
    "made_with,attempts,place,expected",
    [
        (A, [], None, A),
        (A, [A], (*A, 1), A),
        (A, [A, B], (*A, 1), B),  # until the second attempt is published
        (A, [A, B], (*B, 2), B),
        (("none", "a"), [("none", "a"), B], None, B),
        (A, [A, ("none", "a")], (*A, 1), ("none", "a")),
        (A, [A], (*B, 1), B),  # `fitv2 track sync --experiment b`
        (A, [A, A], (*B, 1), A),  # and then an attempt
        (A, [A], ("http://other", "a", 1), ("http://other", "a")),
        (H, [H], (*H, 1), H),
        (A, [None], (*B, None), B),  # versions that recorded neither
        (("none", "a"), [None], (*B, None), B),
        (("auto", "a"), [("auto", "b")], ("sqlite:////nowhere/gone.db", "b", 1), ("auto", "b")),
        (None, [], None, ("auto", "fitv2")),
    ],
)
def test_a_run_is_published_where_it_was_last(tmp_path, made_with, attempts, place, expected):
    """...unless a newer attempt was told another place."""

    def named(settings):
        return {"tracking": dict(zip(("uri", "experiment"), settings, strict=True))} if settings else {}

    run = Run.open_or_create(str(tmp_path / "run"), named(made_with), {}, None)
    for settings in attempts:
        run.claim(named(settings))
    if place:
        uri, experiment, attempt = place
        since = {} if attempt is None else {"attempt": attempt, "run": run.url}
        run.store.put_json("tracking/mlflow.json", {"uri": uri, "experiment": experiment, "mlflow_run": "7"} | since)
    assert settings_of(run) == expected


def test_a_relative_file_gets_its_whole_path(tmp_path, monkeypatch):
    """...given by the config or by the environment: later commands begin in other folders."""
    run = made(tmp_path / "run")
    (tmp_path / "first").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    absolute = f"sqlite:///{tmp_path}/first/a.db?timeout=9"
    assert resolve_uri(run.url, "sqlite:///a.db?timeout=9") == absolute == resolve_uri(run.url, absolute)
    monkeypatch.setenv(VARIABLE, "sqlite:///a.db?timeout=9")
    assert resolve_uri(run.url, "auto") == absolute
    (note,) = notes_at_start(run, "auto", "x")
    assert note == "metrics go to MLflow at sqlite:///a.db?timeout=9, as MLFLOW_TRACKING_URI says"


@pytest.mark.parametrize("name", ["MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"])
def test_an_experiment_of_the_environment_is_not_used_and_that_is_said(tmp_path, monkeypatch, name):
    run = made(tmp_path / "run")
    monkeypatch.setenv(name, "7")
    (note,) = notes_at_start(run, "http://h", "fitv2")
    assert note == (
        f"metrics go to the experiment fitv2; {name}=7 is not used: give tracking.experiment=NAME to change it"
    )
    assert notes_at_start(run, "http://h", "7") == []


def test_a_server_is_no_shared_file(tmp_path, monkeypatch):
    from fitv2_scale.tracking import destination

    mounts = tmp_path / "mountinfo"
    mounts.write_text("21 1 8:1 / / rw - nfs4 filer:/x rw\n")
    monkeypatch.setattr(destination, "_MOUNTS", mounts)
    run = made(tmp_path / "run")
    monkeypatch.delenv(VARIABLE, raising=False)
    assert "is on a shared file system (nfs4)" in journal_only_reason(run.url, "auto")
    monkeypatch.setenv(VARIABLE, "http://h:5000")
    assert journal_only_reason(run.url, "auto") is None


@pytest.mark.parametrize(
    "uri,said",
    [
        ("htp://h:5000", "begins with htp:, which MLflow does not know: give tracking.uri=http://HOST:PORT"),
        ("nonsense:x", "begins with nonsense:"),
        ("http:///x", "names no host"),
        ("http:h:5000", "names no host"),
        ("/runs/mlruns", "is a folder, in which MLflow keeps no runs any more"),
        ("file:///runs/mlruns", "is a folder"),
    ],
)
def test_what_can_never_work_is_said_at_the_start(tmp_path, uri, said):
    (note,) = notes_at_start(made(tmp_path / "run"), uri, "x")
    assert note.startswith(f"nothing is published to MLflow: tracking.uri={uri} {said}")
    assert note.endswith("; the journal keeps the metrics")


@pytest.mark.parametrize(
    "uri",
    ["http://h:5", "https://h", "sqlite:////a.db", "postgresql+psycopg2://u@h/d", "mysql://h/d", "databricks", "uc"],
)
def test_what_could_work_is_tried(tmp_path, uri):
    assert uri_problem(uri) is None and notes_at_start(made(tmp_path / "run"), uri, "x") == []


@pytest.mark.parametrize("uri", ["", "None", "NONE", "null", "off", "False"])
def test_who_wants_no_mlflow_is_told_how_to_say_it(tmp_path, uri):
    (note,) = notes_at_start(made(tmp_path / "run"), uri, "x")
    assert f"nothing is published to MLflow: tracking.uri={uri} names no MLflow: write none, in small letters" in note


def test_a_deleted_experiment_is_seen_in_the_file(tmp_path):
    uri = sqlite_uri(tmp_path / "100% ?.db")
    assert deleted_experiment(uri, "x") is None
    with sqlite3.connect(sqlite_path(uri)) as db:
        db.execute("create table experiments (experiment_id int, name text, lifecycle_stage text)")
        db.execute("insert into experiments values (7, 'x', 'deleted'), (8, 'y', 'active')")
    assert deleted_experiment(uri, "y") is None
    said = (
        "nothing is published to MLflow: the experiment x was deleted in MLflow: restore it with `mlflow experiments "
    )
    (note,) = notes_at_start(made(tmp_path / "run"), uri, "x")
    assert note.startswith(
        f"{said}restore -x 7`, or give another one: tracking.experiment=NAME to `fitv2 train`, --exp"
    )
    (tmp_path / "other.db").write_bytes(b"no database")
    assert deleted_experiment(sqlite_uri(tmp_path / "other.db"), "x") is None
