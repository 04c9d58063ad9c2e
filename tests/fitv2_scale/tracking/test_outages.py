"""What goes wrong on the way to MLflow: outages, refusals, deletions, file systems without locks. Nothing is lost."""

import sqlite3
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_sharding.errors import UserError
from fitv2_scale.cli.__main__ import main
from fitv2_scale.tracking import destination
from fitv2_scale.tracking.destination import journal_only_reason, resolve_uri, shared_file_system
from fitv2_scale.tracking.journal import Journal
from fitv2_scale.tracking.publisher import Publisher, ServerError
from fitv2_scale.tracking.sync import sync
from fitv2_scale.tracking.uploader import Timing, attempt_has_ended, follow, run_is_over
from fitv2_scale.tracking.uploader_state import TroubleReader, read_state
from tests.support.journal_writers import DIGEST, make, train
from tests.support.mlflow_queries import QUICK, published, steps
from tests.support.waiting import wait


def test_an_outage_is_waited_for(run_folder, runs):
    """The database loses a table while the uploader follows, gets it back, and nothing is lost."""
    run = make(run_folder)
    train(run, 0, 5, commits=(5,))
    uri = resolve_uri(str(run_folder), "auto")
    sync(str(run_folder), "auto", "test")
    follower = threading.Thread(target=follow, args=(run, uri, "test", lambda: attempt_has_ended(run), QUICK))
    log = run_folder / "tracking" / "uploader.log"
    with sqlite3.connect(runs / "mlflow.db", timeout=60) as db:
        db.execute("alter table metrics rename to away")
    try:
        follower.start()
        attempt = train(run, 5, 10, commits=(10,))
        said = "the journal keeps the data, retry in 0.04 s"
        wait("an outage", lambda: log.exists() and said in log.read_text())
    finally:
        with sqlite3.connect(runs / "mlflow.db", timeout=60) as db:
            db.execute("alter table away rename to metrics")
    attempt.end(0, "done")
    follower.join(300)
    assert not follower.is_alive()
    assert steps(run_folder) == list(range(1, 11)) and published(run_folder)["status"] == "FINISHED"
    assert all(line[:4].isdigit() for line in log.read_text().splitlines())


def test_a_dead_server_never_holds_up_the_end_and_sync_brings_the_rest(run_folder):
    run = make(run_folder)
    train(run, 0, 5, commits=(5,)).end(0, "done")
    nobody = "http://me:hunter2@127.0.0.1:9"
    follow(run, nobody, "test", lambda: True, Timing(poll=0.02, backoff=0.1, last_pass=0.2))
    log = (run_folder / "tracking" / "uploader.log").read_text()
    assert f"run `fitv2 track sync {run_folder}` to publish the rest" in log and "hunter2" not in log
    with pytest.raises(
        UserError, match=r"MLflow at http://\[redacted\]@127.0.0.1:9 failed while .* nothing is lost"
    ) as said:
        sync(str(run_folder), nobody, "test")
    assert "hunter2" not in str(said.value)
    assert sync(str(run_folder), "auto", "test")["metrics"] == 5


def test_a_run_deleted_on_the_server_is_made_again(run_folder):
    from mlflow import MlflowClient

    run, uri = make(run_folder), resolve_uri(str(run_folder), "auto")
    train(run, 0, 5, commits=(5,))
    said = []
    publisher = Publisher(run, uri, "test", said.append)
    publisher.publish()
    first = publisher.mlflow_run
    MlflowClient(uri).delete_run(first)
    train(run, 5, 10, commits=(10,))
    with pytest.raises(ServerError, match="must be in the 'active' state"):
        publisher.publish()
    assert publisher.publish()["metrics"] == 10
    again = f"everything is sent again to a new one ({publisher.mlflow_run})"
    assert said == [f"the MLflow run {first} no longer exists: {again}"]
    MlflowClient(uri).restore_run(first)  # two with one tag: the one that was written down stays
    assert sync(str(run_folder), "auto", "test")["mlflow_run"] == publisher.mlflow_run != first


def test_what_mlflow_refuses_holds_up_nothing_else(run_folder, monkeypatch):
    """Names and values that are sent as they are, as if this MLflow were stricter than we know."""
    from fitv2_scale.tracking import mlflow_writer

    monkeypatch.setattr(mlflow_writer, "_name", lambda name: name)
    monkeypatch.setattr(mlflow_writer, "MAX_PARAM_VAL_LENGTH", 10_000)
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    run = make(run_folder, {"model": {"dim": 8}, "note": "n" * 7000, "seed": 3})
    attempt = run.claim({})
    log = Journal(attempt.folder, 1, 0)
    for step in range(1, 301):
        log.metrics(step, {"loss": float(step), "odd@name": 1.0, "b": 1.0, "x" * 251: 1.0})
    log.seal()
    attempt.commit(300, "steps/300", DIGEST)
    attempt.end(0, "done")
    said = []
    counts = sync(str(run_folder), "auto", "test", say=said.append)
    assert counts["refused"] == 2 and len(said) == 3
    assert said[0].startswith("MLflow refused a parameter, which is left out: note: ")
    assert said[1].startswith("MLflow refused a metric, which is kept in the journal only: odd@name: ")
    there = published(run_folder)
    assert [(row[0], row[1]) for row in there["metrics"]] == [(s, key) for s in range(1, 301) for key in ("b", "loss")]
    assert there["params"] == {"model.dim": "8", "seed": "3"}


@pytest.mark.parametrize("uri", ["nonsense://mlflow", "/runs/mlruns", "sqlite:////proc/none/mlflow.db"])
def test_a_wrong_uri_is_reported_and_training_continues(run_folder, uri):
    run = make(run_folder)
    train(run, 0, 5, commits=(5,)).end(0, "done")
    follow(run, uri, "test", lambda: True, Timing(poll=0.02, backoff=0.05, last_pass=0.1))
    log = (run_folder / "tracking" / "uploader.log").read_text()
    assert f"MLflow at {uri} failed; the journal keeps the data, retry in 0.05 s: " in log
    assert f"run `fitv2 track sync {run_folder}` to publish the rest" in log and "Traceback" not in log
    assert sync(str(run_folder), "auto", "test")["metrics"] == 5


@pytest.mark.parametrize(
    "status,remedy",
    [
        (401, "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"),
        (403, "set MLFLOW_TRACKING_USERNAME"),
        (404, "check that tracking.uri is that of an MLflow server, and its version"),
        (503, None),
    ],
)
def test_training_is_told_what_lasts(run_folder, status, remedy):
    """Only what nobody but the user can mend; `fitv2 status` shows the rest too."""
    run = make(run_folder)
    train(run, 0, 5, commits=(5,)).end(0, "done")
    reader = TroubleReader(run)
    with answering(status) as uri:
        follow(run, uri, "test", lambda: True, Timing(poll=0.02, backoff=0.05, last_pass=0.1))
    news = reader.news()
    if remedy is None:
        assert news == []
    else:
        (told,) = news
        assert told.startswith(f"MLflow at {uri} failed, the journal keeps the data: ") and remedy in told
    assert reader.news() == []  # once
    assert f"MLflow at {uri} failed" in read_state(run)["trouble"]


@contextmanager
def answering(status: int):
    """A server that answers every request with ``status``; gives its URI."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(status)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_deleted_experiment_is_told_until_it_is_restored(run_folder, capfd):
    from mlflow import MlflowClient

    run, uri = make(run_folder), resolve_uri(str(run_folder), "auto")
    train(run, 0, 5, commits=(5,)).end(0, "done")
    client = MlflowClient(uri)
    gone = client.create_experiment("gone")
    client.delete_experiment(gone)
    said = f"the experiment gone was deleted in MLflow: restore it with `mlflow experiments restore -x {gone}`"
    with pytest.raises(UserError, match=said):
        sync(run.url, uri, "gone")
    reader = TroubleReader(run)
    follow(run, uri, "gone", lambda: True, Timing(poll=0.02, backoff=0.05, last_pass=0.1))
    (told,) = reader.news()
    assert said in told and "or give another one: tracking.experiment=NAME to `fitv2 train`" in told
    assert main(["status", run.url]) == 0 and said in capfd.readouterr().out
    client.restore_experiment(gone)
    follow(run, uri, "gone", lambda: True, Timing(poll=0.02, backoff=0.05))
    assert reader.news() == [] and read_state(run)["trouble"] == ""


def test_a_long_outage_is_told_once(run_folder):
    run = make(run_folder)
    train(run, 0, 5, commits=(5,)).end(0, "done")
    reader, told = TroubleReader(run), []
    over = lambda: told.extend(reader.news()) or bool(told)  # noqa: E731
    follow(run, "http://127.0.0.1:9", "test", over, Timing(0.02, 0.05, last_pass=0.1, patience=0.2))
    assert len(told) == 1 and told[0].startswith("MLflow at http://127.0.0.1:9 failed")


# ---- shared file systems ----

MOUNTS = """\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
22 21 0:5 / /proc rw - proc proc rw
30 21 0:40 / /home rw,relatime shared:2 - nfs4 filer:/home rw,vers=4.2
31 30 8:2 / /home/me/local rw - xfs /dev/sdb rw
32 21 0:41 / /scratch rw shared:3 - lustre mds@o2ib:/scratch rw,flock
33 21 0:42 / /my\\040data rw - fuse.sshfs me@host: rw
34 21 0:43 / /over rw - nfs filer:/over rw
35 34 0:44 / /over rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/runs", None), ("/home/me/runs", "nfs4"), ("/home/me/local/runs", None), ("/scratch", "lustre"),
        ("/scratchy", None), ("/my data/x", "fuse.sshfs"), ("/over/x", None), ("/home", "nfs4"),
    ],
)  # fmt: skip
def test_shared_file_systems_are_known_by_their_type(path, kind):
    assert shared_file_system(Path(path), MOUNTS) == kind


def test_on_a_shared_file_system_sync_is_the_one_writer(run_folder, runs, tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n22 21 0:9 / {runs} rw - nfs4 filer:/x rw\n")
    monkeypatch.setattr(destination, "_MOUNTS", mounts)
    run = make(run_folder, {"tracking": {"uri": "auto"}})
    attempt = train(run, 0, 5, commits=(5,))
    assert "metrics go to the journal only; run `fitv2 track sync" in journal_only_reason(run.url, "auto")
    assert journal_only_reason(run.url, "http://mlflow:5000") is None

    uri = resolve_uri(run.url, "auto")
    other = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('process 7 on n1', file=f, flush=True); print(flush=True); sys.stdin.read()"  # noqa: E501
    command = [sys.executable, "-c", other, str(runs / "mlflow.db.writer")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match="mlflow.db is being written by process 7 on n1: try again"):
            sync(run.url, uri, "test", Timing(last_pass=0.2))
        process.stdin.close()
    sync(run.url, uri, "test")
    assert published(run_folder)["status"] == "RUNNING"  # no uploader there would hold the lock
    attempt.end(75, "SIGTERM")
    sync(run.url, uri, "test")
    assert published(run_folder)["status"] == "KILLED"


def test_sync_follows_a_run_until_it_is_done(run_folder):
    """From another machine, over several attempts, without a process to watch."""
    run = make(run_folder)
    follower = threading.Thread(target=follow, args=(run, resolve_uri(str(run_folder), "auto"), "test"), kwargs={
        "over": lambda: run_is_over(run), "timing": QUICK,
    })  # fmt: skip
    follower.start()
    train(run, 0, 5, commits=(5,)).end(75, "SIGUSR1")
    wait("what is sent", (run_folder / "tracking" / "ack.json").exists)
    assert follower.is_alive()
    train(run, 5, 10, commits=(10,)).end(0, "done")
    follower.join(300)
    assert not follower.is_alive()
    assert steps(run_folder) == list(range(1, 11)) and published(run_folder)["status"] == "FINISHED"
