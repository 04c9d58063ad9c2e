"""The journal's canonical curve, and its way to a real MLflow on SQLite: nothing twice, nothing lost, no secret."""

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sharding.errors import UserError
from fitv2_scale.run import Attempt, Run
from fitv2_scale.tracking import journal
from fitv2_scale.tracking.journal import Journal, Position
from fitv2_scale.tracking.uploader import Patience, follow, resolve_uri, start_uploader, sync

DIGEST = "sha256:00"
QUICK = Patience(poll=0.02, backoff=0.02, backoff_most=0.1, last_pass=20.0)
GONE = 2**22 + 1  # above any process id that Linux gives out


def make(folder: Path, config: dict | None = None) -> Run:
    return Run.open_or_create(str(folder), config or {"model": {"dim": 8}}, {}, "plan")


def train(run: Run, start: int, until: int, commits: tuple[int, ...] = (), seal: bool = True) -> Attempt:
    """An attempt that records a loss at each step of (start, until], equal to attempt + step/1000."""
    attempt = run.claim({})
    log = Journal(attempt.folder, attempt.number, start)
    for step in range(start + 1, until + 1):
        log.metrics(step, {"loss": attempt.number + step / 1000})
        if step in commits:
            log.seal()
            attempt.commit(step, f"steps/{step}", DIGEST)
    if seal:
        log.seal()
    return attempt


def curve(run: Run, after: Position = Position()) -> list[tuple[int, int]]:  # noqa: B008
    """(step, attempt that measured it), read back from the losses."""
    return [(r.step, int(r.metrics["loss"])) for r in journal.read(run, after)]


# ---- the journal ----


def test_lines_are_as_documented(tmp_path):
    log = Journal(tmp_path, attempt=3, start_step=100)
    log.metrics(120, {"loss": 0.91})
    log.picture(200, "samples/00000200.png")
    log.seal()
    first, second, third = (
        json.loads(line) for line in (tmp_path / "journal" / "00000.jsonl").read_text().splitlines()
    )
    assert first == {"attempt": 3, "start_step": 100}
    assert abs(second.pop("time_ms") - time.time() * 1000) < 60_000 and third.pop("time_ms")
    assert second == {"step": 120, "metrics": {"loss": 0.91}}
    assert third == {"step": 200, "picture": "samples/00000200.png"}


def test_only_committed_steps_are_read(tmp_path):
    run = make(tmp_path)
    train(run, 0, 25, commits=(10, 20))
    assert curve(run) == [(step, 1) for step in range(1, 21)]


def test_a_restart_leaves_one_monotone_curve(tmp_path):
    run = make(tmp_path)
    train(run, 0, 25, commits=(10, 20))  # killed at 25, beyond its last commit
    train(run, 20, 22)  # killed before it committed
    train(run, 20, 40, commits=(30, 40))
    assert curve(run) == [(s, 1) for s in range(1, 21)] + [(s, 3) for s in range(21, 41)]


def test_a_fall_back_to_an_older_commit_repeats_nothing(tmp_path):
    run = make(tmp_path)
    train(run, 0, 20, commits=(10, 20))
    bad = run.log.commits()[-1]
    second = run.claim({})
    second.retire(bad.n)
    train(run, 10, 30, commits=(20, 30))  # commits 20 again
    assert curve(run) == [(s, 1) for s in range(1, 21)] + [(s, 3) for s in range(21, 31)]


def test_records_of_one_step_are_all_read_and_step_0_counts(tmp_path):
    run = make(tmp_path)
    attempt = run.claim({})
    log = Journal(attempt.folder, 1, 0)
    log.picture(0, "samples/0.png")
    log.metrics(5, {"a": 1})
    log.metrics(5, {"b": 2})
    log.seal()
    attempt.commit(5, "steps/5", DIGEST)
    assert [(r.step, r.metrics, r.picture) for r in journal.read(run)] == [
        (0, None, "samples/0.png"), (5, {"a": 1.0}, None), (5, {"b": 2.0}, None),
    ]  # fmt: skip


def test_a_record_written_late_keeps_those_before_it(tmp_path):
    """A picture of step 5 that is ready after the loss of step 6: read on, nothing is skipped, then or later."""
    run = make(tmp_path)
    attempt = run.claim({})
    log = Journal(attempt.folder, 1, 0)
    log.metrics(4, {"loss": 1.0})
    log.metrics(6, {"loss": 1.0})
    log.picture(5, "samples/5.png")
    log.seal()
    attempt.commit(5, "steps/5", DIGEST)
    first = list(journal.read(run))
    attempt.commit(6, "steps/6", DIGEST)
    then = list(journal.read(run, first[-1].end))
    assert [r.step for r in first] == [4] and [r.step for r in then] == [6, 5]


def test_non_finite_values_survive(tmp_path):
    run = make(tmp_path)
    attempt = run.claim({})
    log = Journal(attempt.folder, 1, 0)
    log.metrics(1, {"nan": math.nan, "inf": math.inf, "minus": -math.inf})
    log.seal()
    attempt.commit(1, "steps/1", DIGEST)
    (record,) = journal.read(run)
    assert math.isnan(record.metrics["nan"])
    assert (record.metrics["inf"], record.metrics["minus"]) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    "torn", [b'{"step":3,"time_ms":1,"met', b"\0" * 100 + b"\n", b'{"step":3,"time_ms":1,"metrics":{}}']
)
def test_a_torn_tail_is_ignored(tmp_path, torn):
    run = make(tmp_path)
    attempt = train(run, 0, 2)
    with open(attempt.folder / "journal" / "00000.jsonl", "ab") as file:
        file.write(torn)
    attempt.commit(9, "steps/9", DIGEST)
    train(run, 9, 10, commits=(10,))
    assert curve(run) == [(1, 1), (2, 1), (10, 2)]


def test_sealed_records_survive_kill_9(tmp_path):
    code = (
        "import os, pathlib, sys; from fitv2_scale.tracking.journal import Journal\n"
        "log = Journal(pathlib.Path(sys.argv[1]), 1, 0)\n"
        "for step in range(1, 11): log.metrics(step, {'loss': 1.0})\n"
        "log.seal(); log.metrics(11, {'loss': 1.0}); os.kill(os.getpid(), 9)"
    )
    run = make(tmp_path)
    attempt = run.claim({})
    assert subprocess.run([sys.executable, "-c", code, str(attempt.folder)]).returncode == -signal.SIGKILL
    attempt.commit(11, "steps/11", DIGEST)  # more than was sealed: read what is there
    assert [step for step, _ in curve(run)] == list(range(1, 11))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12), st.integers(1, 4)), min_size=1, max_size=5), st.data())
def test_reading_on_equals_reading_at_once(tmp_path_factory, plan, data):
    """However often attempts die and fall back, a reader that goes on from its last place sees the one curve."""
    run = make(tmp_path_factory.mktemp("run"))
    seen, place = [], Position()

    def look() -> None:
        nonlocal place
        for record in journal.read(run, place):
            seen.append((record.step, int(record.metrics["loss"])))
            place = record.end

    for fall_back, length, every in plan:
        commits = [e.fields["step"] for e in run.log.commits()]
        start = ([0] + commits)[-1 - min(fall_back, len(commits))]
        attempt = run.claim({})
        log = Journal(attempt.folder, attempt.number, start)
        for step in range(start + 1, start + length + 1):
            log.metrics(step, {"loss": attempt.number + step / 1000})
            if step % every == 0:
                log.seal()
                attempt.commit(step, f"steps/{step}", DIGEST)
            if data.draw(st.booleans()):
                look()
    look()
    committed = [e.fields["step"] for e in run.log.entries() if e.kind == "COMMIT"]
    assert seen == curve(run)
    assert [step for step, _ in seen] == list(range(1, max(committed, default=0) + 1))


# ---- MLflow ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs, which all publish to one mlflow.db beside them: making that takes MLflow seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def folder(runs, request) -> Path:
    return runs / request.node.name


def published(folder: Path) -> dict:
    """What MLflow's database holds for the run at ``folder``: rows as they are, so that duplicates show."""
    run = Run.open(str(folder))
    with sqlite3.connect(folder.parent / "mlflow.db") as db:
        found = db.execute("select run_uuid from tags where key = 'fitv2.run_id' and value = ?", (run.id,)).fetchall()
        assert len(found) == 1, f"{len(found)} MLflow runs for one run"
        (uuid,) = found[0]

        def all_of(query: str) -> list:
            return db.execute(query, (uuid,)).fetchall()

        status, start, end, artifacts = all_of(
            "select status, start_time, end_time, artifact_uri from runs where run_uuid=?"
        )[0]
        return {
            "metrics": all_of(
                "select step, key, value, is_nan, timestamp from metrics where run_uuid=? order by step, key"
            ),
            "params": dict(all_of("select key, value from params where run_uuid=?")),
            "tags": dict(all_of("select key, value from tags where run_uuid=?")),
            "status": status,
            "start": start,
            "end": end,
            "artifacts": Path(artifacts.removeprefix("file://")),
        }


def steps(folder: Path) -> list[int]:
    return [row[0] for row in published(folder)["metrics"]]


def test_everything_arrives_once_with_its_times(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")  # some servers do not
    run = make(folder, {"model": {"dim": 8, "blocks": [1, 2]}, "note": "n" * 7000, "mlflow": {"password": "hunter2"}})
    (folder / "samples").mkdir()
    (folder / "samples" / "00000002.png").write_bytes(b"picture")
    attempt = run.claim({})
    log = Journal(attempt.folder, 1, 0)
    log.metrics(1, {"loss": 0.5, "odd@name": 1})
    log.metrics(2, {"loss": math.nan})
    log.picture(2, "samples/00000002.png")
    log.picture(2, "samples/gone.png")
    log.seal()
    attempt.commit(2, "steps/2", DIGEST)
    attempt.end(0, "done")

    counts = sync(str(folder), "auto", "test")
    assert (counts["metrics"], counts["pictures"], counts["missing"]) == (3, 1, 1)
    there = published(folder)
    times = [r.time_ms for r in journal.read(run)]
    assert there["metrics"] == [
        (1, "loss", 0.5, 0, times[0]), (1, "odd_name", 1.0, 0, times[0]), (2, "loss", 0.0, 1, times[1]),
    ]  # fmt: skip
    assert there["params"] == {
        "model.dim": "8", "model.blocks": "[1, 2]", "note": "n" * 6000, "mlflow.password": "[redacted]",
    }  # fmt: skip
    assert there["tags"]["fitv2.science_hash"] == run.science_hash and there["tags"]["fitv2.attempt"] == "1"
    assert there["status"] == "FINISHED" and there["start"] < there["end"] < time.time() * 1000
    assert there["artifacts"].is_relative_to(folder.parent / "mlartifacts")
    assert (there["artifacts"] / "samples" / "00000002.png").read_bytes() == b"picture"
    place = json.loads((folder / "tracking" / "mlflow.json").read_bytes())
    assert place == {"uri": resolve_uri(str(folder), "auto"), "experiment": "test", "mlflow_run": counts["mlflow_run"]}

    again = sync(str(folder), "auto", "test")
    assert again["metrics"] == again["pictures"] == 0 and again["mlflow_run"] == counts["mlflow_run"]
    assert published(folder) == there


def test_attempts_of_one_run_are_one_mlflow_run(folder):
    run = make(folder)
    train(run, 0, 12, commits=(5, 10)).end(75, "SIGUSR1")
    sync(str(folder), "auto", "test")
    assert published(folder)["status"] == "KILLED"
    train(run, 5, 20, commits=(10, 15, 20)).end(1, "a bug")
    sync(str(folder), "auto", "test")
    there = published(folder)
    assert there["status"] == "FAILED" and there["tags"]["fitv2.attempt"] == "2"
    assert [(row[0], int(row[2])) for row in there["metrics"]] == [(s, 1 if s <= 10 else 2) for s in range(1, 21)]


@pytest.mark.parametrize("died", ["before", "after"])
def test_an_uploader_killed_at_its_acknowledgement_repeats_nothing(folder, monkeypatch, died):
    """Killed when MLflow has the second batch, before or after that is written down: it is sent again, or is not."""
    from fitv2_scale.store import LocalStore
    from fitv2_scale.tracking import publisher

    monkeypatch.setattr(publisher, "MAX_METRICS_PER_BATCH", 10)
    run = make(folder)
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
        sync(str(folder), "auto", "test")
    assert steps(folder) == list(range(1, 21))
    monkeypatch.setattr(LocalStore, "put", real)
    assert sync(str(folder), "auto", "test")["metrics"] == (25 if died == "before" else 15)
    assert steps(folder) == list(range(1, 36))


def test_an_edited_config_neither_fails_nor_leaks(folder):
    """MLflow refuses to change a param; run.json could have been written by a version that hid less."""
    run = make(folder, {"model": {"dim": 8}})
    train(run, 0, 5, commits=(5,)).end(0, "done")
    sync(str(folder), "auto", "test")
    record = json.loads((folder / "run.json").read_bytes())
    record["config"] = {"model": {"dim": 16}, "mlflow": {"password": "hunter2"}}
    (folder / "run.json").write_text(json.dumps(record))
    sync(str(folder), "auto", "test")
    assert published(folder)["params"] == {"model.dim": "8", "mlflow.password": "[redacted]"}


def test_another_server_gets_everything(folder):
    run = Run.open_or_create(str(folder), {}, {}, None, {"run": "/runs/first", "step": 7})  # imported: no plan yet
    train(run, 0, 5, commits=(5,)).end(0, "done")
    sync(str(folder), "auto", "test")
    tags = published(folder)["tags"]
    assert json.loads(tags["fitv2.parent"]) == {"run": "/runs/first", "step": 7} and "fitv2.plan_hash" not in tags
    assert sync(str(folder), "auto", "second experiment")["metrics"] == 5


def test_an_outage_is_waited_for(folder, runs):
    """The database loses a table while the uploader follows, gets it back, and nothing is lost."""
    run = make(folder)
    train(run, 0, 5, commits=(5,))
    uri = resolve_uri(str(folder), "auto")
    sync(str(folder), "auto", "test")
    follower = threading.Thread(target=follow, args=(run, uri, "test", os.getpid(), QUICK))
    log = folder / "tracking" / "uploader.log"
    with sqlite3.connect(runs / "mlflow.db") as db:
        db.execute("alter table metrics rename to away")
    try:
        follower.start()
        attempt = train(run, 5, 10, commits=(10,))
        wait(lambda: log.exists() and "waiting 0.04 s for MLflow" in log.read_text())
    finally:
        with sqlite3.connect(runs / "mlflow.db") as db:
            db.execute("alter table away rename to metrics")
    attempt.end(0, "done")
    follower.join(20)
    assert not follower.is_alive()
    assert steps(folder) == list(range(1, 11)) and published(folder)["status"] == "FINISHED"
    assert all(line[:4].isdigit() for line in log.read_text().splitlines())


def test_a_dead_server_never_holds_up_the_end_and_sync_brings_the_rest(folder):
    run = make(folder)
    train(run, 0, 5, commits=(5,)).end(0, "done")
    nobody = "http://me:hunter2@127.0.0.1:9"
    follow(run, nobody, "test", GONE, Patience(poll=0.02, backoff=0.1, last_pass=0.2))
    log = (folder / "tracking" / "uploader.log").read_text()
    assert f"waits for `fitv2 track sync {folder}`" in log and "hunter2" not in log
    with pytest.raises(
        UserError, match=r"MLflow at http://\[redacted\]@127.0.0.1:9 does not take .* nothing is lost"
    ) as said:
        sync(str(folder), nobody, "test")
    assert "hunter2" not in str(said.value)
    assert sync(str(folder), "auto", "test")["metrics"] == 5


def test_one_uploader_at_a_time(folder):
    from fitv2_scale.tracking.uploader import _Lock

    run = make(folder)
    attempt = train(run, 0, 5, commits=(5,))
    with _Lock(run) as lock:
        assert lock.held()
        with pytest.raises(UserError, match="published by another uploader"):
            sync(str(folder), "auto", "test", QUICK)
        attempt.end(0, "done")  # the other is about to finish: worth waiting for
        waiting = threading.Thread(target=sync, args=(str(folder), "auto", "test", QUICK))
        waiting.start()
        time.sleep(0.1)
        assert waiting.is_alive()
    waiting.join(20)
    assert steps(folder) == list(range(1, 6))


def test_the_process_follows_training_and_ignores_its_signals(folder):
    """The real thing: started by a trainer that is then killed with SIGKILL; a second one lets its attempt end."""
    trainer = (
        "import sys, time; from fitv2_scale.tracking.uploader import start_uploader\n"
        "print(start_uploader(sys.argv[1], 'auto', 'test').pid, flush=True); time.sleep(60)"
    )
    run = make(folder)
    train(run, 0, 5, commits=(5,))
    process = subprocess.Popen([sys.executable, "-c", trainer, str(folder)], stdout=subprocess.PIPE, text=True)
    uploader = int(process.stdout.readline())
    wait(lambda: (folder / "tracking" / "ack.json").exists())
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        os.kill(uploader, number)
    process.kill()  # and not yet reaped: a zombie must count as gone
    wait(lambda: published(folder)["status"] == "KILLED")
    process.wait()
    process.stdout.close()

    attempt = train(run, 5, 10, commits=(10,))
    child = start_uploader(str(folder), "auto", "test")
    wait(lambda: published(folder)["status"] == "RUNNING" and len(steps(folder)) == 10)
    attempt.end(0, "done")
    assert child.wait(20) == 0
    assert published(folder)["status"] == "FINISHED" and steps(folder) == list(range(1, 11))
    assert (folder / "tracking" / "uploader.log").read_text() == ""


def test_training_never_loads_mlflow_and_bad_input_is_one_sentence(tmp_path):
    check = (
        "import sys, fitv2_scale.tracking.uploader, fitv2_scale.tracking.journal; assert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
    command = [sys.executable, "-m", "fitv2_scale.tracking.uploader", str(tmp_path / "none"), "--experiment", "x"]
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


def wait(happened, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)
