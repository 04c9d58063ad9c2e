"""The way of a run's journal to a real MLflow on SQLite: nothing twice, nothing lost, no secret."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from data_sharding.errors import UserError
from fitv2_scale.run.run import Run
from fitv2_scale.tracking import journal
from fitv2_scale.tracking.destination import resolve_uri
from fitv2_scale.tracking.journal import Journal
from fitv2_scale.tracking.locks import RunLock
from fitv2_scale.tracking.sync import sync
from fitv2_scale.tracking.uploader_process import Uploader
from tests.support.journal_writers import DIGEST, make, train
from tests.support.mlflow_queries import QUICK, published, steps
from tests.support.waiting import wait


def test_everything_arrives_once_with_its_times(run_folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")  # some servers do not
    run = make(
        run_folder, {"model": {"dim": 8, "blocks": [1, 2]}, "note": "n" * 7000, "mlflow": {"password": "hunter2"}}
    )
    (run_folder / "samples").mkdir()
    (run_folder / "samples" / "00000002.png").write_bytes(b"picture")
    attempt = run.claim({})
    log = Journal(attempt.folder, 1, 0)
    log.metrics(1, {"loss": 0.5, "odd@name": 1})
    log.metrics(2, {"loss": math.nan})
    log.picture(2, "samples/00000002.png")
    log.picture(2, "samples/gone.png")
    log.seal()
    attempt.commit(2, "steps/2", DIGEST)
    attempt.end(0, "done")

    counts = sync(str(run_folder), "auto", "test")
    assert (counts["metrics"], counts["pictures"], counts["missing"]) == (3, 1, 1)
    there = published(run_folder)
    times = [r.time_ms for r in journal.read(run)]
    assert there["metrics"] == [
        (1, "loss", 0.5, 0, times[0]), (1, "odd_name", 1.0, 0, times[0]), (2, "loss", 0.0, 1, times[1]),
    ]  # fmt: skip
    assert there["params"] == {
        "model.dim": "8", "model.blocks": "[1, 2]", "note": "n" * 6000, "mlflow.password": "[redacted]",
    }  # fmt: skip
    assert there["tags"]["fitv2.recipe_hash"] == run.recipe_hash and there["tags"]["fitv2.attempt"] == "1"
    assert there["status"] == "FINISHED" and there["start"] < there["end"] < time.time() * 1000
    assert there["artifacts"].is_relative_to(run_folder.parent / "mlartifacts")
    assert (there["artifacts"] / "samples" / "00000002.png").read_bytes() == b"picture"
    place = json.loads((run_folder / "tracking" / "mlflow.json").read_bytes())
    assert place == {
        "uri": resolve_uri(str(run_folder), "auto"),
        "experiment": "test",
        "mlflow_run": counts["mlflow_run"],
        "run": str(run_folder),
        "name": run.id,
        "attempt": 1,
    }

    again = sync(str(run_folder), "auto", "test")
    assert again["metrics"] == again["pictures"] == 0 and again["mlflow_run"] == counts["mlflow_run"]
    assert published(run_folder) == there


def test_attempts_of_one_run_are_one_mlflow_run(run_folder):
    run = make(run_folder)
    train(run, 0, 12, commits=(5, 10)).end(75, "SIGUSR1")
    sync(str(run_folder), "auto", "test")
    assert published(run_folder)["status"] == "KILLED"
    train(run, 5, 20, commits=(10, 15, 20)).end(1, "a bug")
    sync(str(run_folder), "auto", "test")
    there = published(run_folder)
    assert there["status"] == "FAILED" and there["tags"]["fitv2.attempt"] == "2"
    assert [(row[0], int(row[2])) for row in there["metrics"]] == [(s, 1 if s <= 10 else 2) for s in range(1, 21)]


@pytest.mark.parametrize("died", ["before", "after"])
def test_an_uploader_killed_at_its_acknowledgement_repeats_nothing(run_folder, monkeypatch, died):
    """Killed when MLflow has the second batch, before or after that is written down: it is sent again, or is not."""
    from data_sharding.storage.local_store import LocalStore
    from fitv2_scale.tracking import publisher

    monkeypatch.setattr(publisher, "MAX_METRICS_PER_BATCH", 10)
    run = make(run_folder)
    train(run, 0, 35, commits=(35,)).end(0, "done")
    real, acks = LocalStore.put, []

    def put(store: LocalStore, path: str, data: bytes) -> None:
        acks.extend([path] if path.endswith("ack.json") else [])
        if len(acks) == 2 and died == "before":
            raise KeyboardInterrupt
        real(store, path, data)
        if len(acks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(LocalStore, "put", put)
    with pytest.raises(KeyboardInterrupt):
        sync(str(run_folder), "auto", "test")
    assert steps(run_folder) == list(range(1, 21))
    monkeypatch.setattr(LocalStore, "put", real)
    assert sync(str(run_folder), "auto", "test")["metrics"] == (25 if died == "before" else 15)
    assert steps(run_folder) == list(range(1, 36))


def test_an_edited_config_neither_fails_nor_leaks(run_folder):
    """MLflow refuses to change a param; run.json could have been written by a version that hid less."""
    run = make(run_folder, {"model": {"dim": 8}})
    train(run, 0, 5, commits=(5,)).end(0, "done")
    sync(str(run_folder), "auto", "test")
    record = json.loads((run_folder / "run.json").read_bytes())
    record["config"] = {"model": {"dim": 16}, "mlflow": {"password": "hunter2"}}
    (run_folder / "run.json").write_text(json.dumps(record))
    sync(str(run_folder), "auto", "test")
    assert published(run_folder)["params"] == {"model.dim": "8", "mlflow.password": "[redacted]"}


def test_another_server_gets_everything(run_folder):
    run = Run.open_or_create(str(run_folder), {}, {}, None, {"run": "first-0f", "step": 7})  # imported: no plan yet
    train(run, 0, 5, commits=(5,)).end(0, "done")
    sync(str(run_folder), "auto", "test")
    tags = published(run_folder)["tags"]
    assert (tags["fitv2.parent_run"], tags["fitv2.branch_step"]) == ("first-0f", "7") and "fitv2.plan_hash" not in tags
    assert sync(str(run_folder), "auto", "second experiment")["metrics"] == 5


def test_one_uploader_at_a_time(run_folder):
    run = make(run_folder)
    attempt = train(run, 0, 5, commits=(5,))
    with RunLock(run) as lock:
        assert lock.acquire()
        with pytest.raises(UserError, match="published by another uploader"):
            sync(str(run_folder), "auto", "test", QUICK)
        attempt.end(0, "done")  # the other is about to finish: worth waiting for
        waiting = threading.Thread(target=sync, args=(str(run_folder), "auto", "test", QUICK))
        waiting.start()
        time.sleep(0.1)
        assert waiting.is_alive()
    waiting.join(300)
    assert steps(run_folder) == list(range(1, 6))


def test_the_process_follows_training_and_ignores_its_signals(run_folder):
    """The real thing: started by a trainer that is then killed with SIGKILL; a second one lets its attempt end."""
    trainer = (
        "import sys, time; from fitv2_scale.tracking.uploader_process import Uploader\n"
        "print(Uploader(sys.argv[1], 'auto', 'test').process.pid, flush=True); time.sleep(600)"
    )
    run = make(run_folder)
    train(run, 0, 5, commits=(5,))
    process = subprocess.Popen([sys.executable, "-c", trainer, str(run_folder)], stdout=subprocess.PIPE, text=True)
    uploader = int(process.stdout.readline())
    wait("what is sent", (run_folder / "tracking" / "ack.json").exists)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        os.kill(uploader, number)
    process.kill()  # and not yet reaped: a zombie must count as gone
    wait("the end", lambda: published(run_folder)["status"] == "KILLED")
    process.wait()
    process.stdout.close()

    attempt = train(run, 5, 10, commits=(10,))
    child = Uploader(str(run_folder), "auto", "test").process
    wait("10 steps", lambda: published(run_folder)["status"] == "RUNNING" and len(steps(run_folder)) == 10)
    attempt.end(0, "done")
    assert child.wait(300) == 0
    assert published(run_folder)["status"] == "FINISHED" and steps(run_folder) == list(range(1, 11))
    assert (run_folder / "tracking" / "uploader.log").read_text() == ""


def test_training_never_loads_mlflow_and_bad_input_is_one_sentence(tmp_path):
    check = "import sys, fitv2_scale.train.setup; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
    command = [
        sys.executable,
        "-m",
        "fitv2_scale.tracking.uploader",
        str(tmp_path / "none"),
        "--experiment",
        "x",
        "--follow",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "is not a run" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("run", "uri", "means"),
    [
        ("/runs/demo", "auto", "sqlite:////runs/mlflow.db"),
        ("file:///runs/demo/", "auto", "sqlite:////runs/mlflow.db"),
        ("/runs/demo", "http://mlflow:5000", "http://mlflow:5000"),
    ],
)
def test_resolve_uri(run, uri, means):
    assert resolve_uri(run, uri) == means
