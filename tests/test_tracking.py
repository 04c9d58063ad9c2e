"""The way of a run's journal to a real MLflow on SQLite: nothing twice, nothing lost, no secret."""

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
import yaml
from journals import DIGEST, make, train
from waiting import wait

from data_sharding.errors import UserError
from fitv2_scale.run import Run
from fitv2_scale.tracking import journal, target
from fitv2_scale.tracking.journal import Journal
from fitv2_scale.tracking.launch import Uploader
from fitv2_scale.tracking.live import KEYS
from fitv2_scale.tracking.lock import Lock
from fitv2_scale.tracking.publisher import Publisher, ServerError
from fitv2_scale.tracking.sync import sync
from fitv2_scale.tracking.tags import family
from fitv2_scale.tracking.target import resolve_uri, shared_file_system, why_journal_only
from fitv2_scale.tracking.uploader import Patience, attempt_has_ended, follow, run_is_over

QUICK = Patience(poll=0.02, backoff=0.02, backoff_most=0.1, last_pass=300.0)


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
    with sqlite3.connect(folder.parent / "mlflow.db", timeout=60) as db:
        found = db.execute("select run_uuid from tags where key = 'fitv2.run_id' and value = ?", (run.id,)).fetchall()
        assert len(found) == 1, f"{len(found)} MLflow runs for one run"
        return contents(db, found[0][0])


def contents(db: sqlite3.Connection, uuid: str) -> dict:
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
    run = Run.open_or_create(str(folder), {}, {}, None, {"run": "first-0f", "step": 7})  # imported: no plan yet
    train(run, 0, 5, commits=(5,)).end(0, "done")
    sync(str(folder), "auto", "test")
    tags = published(folder)["tags"]
    assert (tags["fitv2.parent_run"], tags["fitv2.branch_step"]) == ("first-0f", "7") and "fitv2.plan_hash" not in tags
    assert sync(str(folder), "auto", "second experiment")["metrics"] == 5


def test_an_outage_is_waited_for(folder, runs):
    """The database loses a table while the uploader follows, gets it back, and nothing is lost."""
    run = make(folder)
    train(run, 0, 5, commits=(5,))
    uri = resolve_uri(str(folder), "auto")
    sync(str(folder), "auto", "test")
    follower = threading.Thread(target=follow, args=(run, uri, "test", lambda: attempt_has_ended(run), QUICK))
    log = folder / "tracking" / "uploader.log"
    with sqlite3.connect(runs / "mlflow.db", timeout=60) as db:
        db.execute("alter table metrics rename to away")
    try:
        follower.start()
        attempt = train(run, 5, 10, commits=(10,))
        said = "the journal keeps it, next try in 0.04 s"
        wait("an outage", lambda: log.exists() and said in log.read_text())
    finally:
        with sqlite3.connect(runs / "mlflow.db", timeout=60) as db:
            db.execute("alter table away rename to metrics")
    attempt.end(0, "done")
    follower.join(300)
    assert not follower.is_alive()
    assert steps(folder) == list(range(1, 11)) and published(folder)["status"] == "FINISHED"
    assert all(line[:4].isdigit() for line in log.read_text().splitlines())


def test_a_dead_server_never_holds_up_the_end_and_sync_brings_the_rest(folder):
    run = make(folder)
    train(run, 0, 5, commits=(5,)).end(0, "done")
    nobody = "http://me:hunter2@127.0.0.1:9"
    follow(run, nobody, "test", lambda: True, Patience(poll=0.02, backoff=0.1, last_pass=0.2))
    log = (folder / "tracking" / "uploader.log").read_text()
    assert f"waits for `fitv2 track sync {folder}`" in log and "hunter2" not in log
    with pytest.raises(
        UserError, match=r"MLflow at http://\[redacted\]@127.0.0.1:9 does not take .* nothing is lost"
    ) as said:
        sync(str(folder), nobody, "test")
    assert "hunter2" not in str(said.value)
    assert sync(str(folder), "auto", "test")["metrics"] == 5


def test_one_uploader_at_a_time(folder):
    run = make(folder)
    attempt = train(run, 0, 5, commits=(5,))
    with Lock(run) as lock:
        assert lock.held()
        with pytest.raises(UserError, match="published by another uploader"):
            sync(str(folder), "auto", "test", QUICK)
        attempt.end(0, "done")  # the other is about to finish: worth waiting for
        waiting = threading.Thread(target=sync, args=(str(folder), "auto", "test", QUICK))
        waiting.start()
        time.sleep(0.1)
        assert waiting.is_alive()
    waiting.join(300)
    assert steps(folder) == list(range(1, 6))


def test_the_process_follows_training_and_ignores_its_signals(folder):
    """The real thing: started by a trainer that is then killed with SIGKILL; a second one lets its attempt end."""
    trainer = (
        "import sys, time; from fitv2_scale.tracking.launch import Uploader\n"
        "print(Uploader(sys.argv[1], 'auto', 'test').process.pid, flush=True); time.sleep(600)"
    )
    run = make(folder)
    train(run, 0, 5, commits=(5,))
    process = subprocess.Popen([sys.executable, "-c", trainer, str(folder)], stdout=subprocess.PIPE, text=True)
    uploader = int(process.stdout.readline())
    wait("what is sent", (folder / "tracking" / "ack.json").exists)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        os.kill(uploader, number)
    process.kill()  # and not yet reaped: a zombie must count as gone
    wait("the end", lambda: published(folder)["status"] == "KILLED")
    process.wait()
    process.stdout.close()

    attempt = train(run, 5, 10, commits=(10,))
    child = Uploader(str(folder), "auto", "test").process
    wait("10 steps", lambda: published(folder)["status"] == "RUNNING" and len(steps(folder)) == 10)
    attempt.end(0, "done")
    assert child.wait(300) == 0
    assert published(folder)["status"] == "FINISHED" and steps(folder) == list(range(1, 11))
    assert (folder / "tracking" / "uploader.log").read_text() == ""


def test_training_never_loads_mlflow_and_bad_input_is_one_sentence(tmp_path):
    check = "import sys, fitv2_scale.session; assert 'mlflow' not in sys.modules"
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


# ---- what is live ----


def children(folder: Path) -> list[dict]:
    """The child runs of the run at ``folder``, oldest first."""
    run = Run.open(str(folder))
    with sqlite3.connect(folder.parent / "mlflow.db", timeout=60) as db:
        uuids = db.execute(
            "select run_uuid, value from tags where key = 'fitv2.live_id' and value like ?", (f"{run.id}/%",)
        )
        return [contents(db, uuid) for uuid, _ in sorted(uuids, key=lambda row: int(row[1].rpartition("/")[2]))]


def points(child: dict, key: str) -> list[tuple[int, float]]:
    return [(step, value) for step, name, value, _, _ in child["metrics"] if name == key]


def test_a_child_run_shows_what_is_live(folder):
    """Every tenth record, uncommitted ones included, six keys at most; one child an attempt, closed with it."""
    run = make(folder)
    train(run, 0, 45, commits=(20,))
    sync(str(folder), "auto", "test")
    assert published(folder)["tags"]["fitv2.lag"] == "25 steps: 45 measured, 20 committed"
    attempt = run.claim({})
    log = Journal(attempt.folder, 2, 20)
    for step in range(21, 33):
        log.metrics(step, {name: float(step) for name in (*KEYS, "odd")})
        log.metrics(step, {"validation": 1.0})  # counts for nothing
    log.seal()
    Publisher(run, resolve_uri(str(folder), "auto"), "test", print).publish()
    first, second = children(folder)
    assert points(first, "loss") == [(s, 1 + s / 1000) for s in (1, 11, 21, 31, 41)]
    assert points(first, "lag_steps") == [(1, 1), (11, 11), (21, 1), (31, 11), (41, 21)]
    assert {row[1] for row in second["metrics"]} == {*KEYS, "lag_steps"} and len({*KEYS}) < 6
    assert points(second, "mfu") == [(21, 21.0), (31, 31.0)]
    parent = json.loads((folder / "tracking" / "mlflow.json").read_bytes())["mlflow_run"]
    for child, number, status in [(first, 1, "KILLED"), (second, 2, "RUNNING")]:
        assert child["tags"]["mlflow.parentRunId"] == parent and child["tags"]["fitv2.attempt"] == str(number)
        assert child["status"] == status
    attempt.end(1, "a bug")
    sync(str(folder), "auto", "test")
    assert [child["status"] for child in children(folder)] == ["KILLED", "FAILED"]
    assert steps(folder) == list(range(1, 21))


def test_a_child_run_goes_on_where_it_was(folder, monkeypatch):
    """Killed before or after it wrote down what it sent, its uploader repeats no point and skips none."""
    from fitv2_scale.tracking import live

    run, real = make(folder), live.put
    attempt = run.claim({})
    log = Journal(attempt.folder, 1, 0)
    for step in range(1, 101):
        log.metrics(step, {"loss": float(step)})
        if step % 7 == 0:
            log.seal()  # the live reader sees sealed segments and growing ones alike
        if step in (33, 66):
            monkeypatch.setattr(live, "put", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                sync(str(folder), "auto", "test")
            monkeypatch.setattr(live, "put", real)
        if step in (34, 90):
            sync(str(folder), "auto", "test")
    log.seal()
    attempt.end(0, "done")
    sync(str(folder), "auto", "test")
    (child,) = children(folder)
    assert points(child, "loss") == [(s, float(s)) for s in range(1, 101, 10)] and child["status"] == "FINISHED"


# ---- what goes wrong ----


def test_a_run_deleted_on_the_server_is_made_anew(folder):
    from mlflow import MlflowClient

    run, uri = make(folder), resolve_uri(str(folder), "auto")
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
    assert said == [f"MLflow's run {first} is gone: everything is sent again, to a new one ({publisher.mlflow_run})"]
    MlflowClient(uri).restore_run(first)  # two with one tag: the one that was written down stays
    assert sync(str(folder), "auto", "test")["mlflow_run"] == publisher.mlflow_run != first


def test_what_mlflow_refuses_holds_up_nothing_else(folder, monkeypatch):
    """Names and values that are sent as they are, as if this MLflow were stricter than we know."""
    from fitv2_scale.tracking import mlflow_sink

    monkeypatch.setattr(mlflow_sink, "_name", lambda name: name)
    monkeypatch.setattr(mlflow_sink, "MAX_PARAM_VAL_LENGTH", 10_000)
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    run = make(folder, {"model": {"dim": 8}, "note": "n" * 7000, "seed": 3})
    attempt = run.claim({})
    log = Journal(attempt.folder, 1, 0)
    for step in range(1, 301):
        log.metrics(step, {"loss": float(step), "odd@name": 1.0, "b": 1.0, "x" * 251: 1.0})
    log.seal()
    attempt.commit(300, "steps/300", DIGEST)
    attempt.end(0, "done")
    said = []
    counts = sync(str(folder), "auto", "test", say=said.append)
    assert counts["refused"] == 2 and len(said) == 3
    assert said[0].startswith("MLflow refuses a parameter, the run goes without: note: ")
    assert said[1].startswith("MLflow refuses a metric, which stays in the journal only: odd@name: ")
    there = published(folder)
    assert [(row[0], row[1]) for row in there["metrics"]] == [(s, key) for s in range(1, 301) for key in ("b", "loss")]
    assert there["params"] == {"model.dim": "8", "seed": "3"}


@pytest.mark.parametrize("uri", ["nonsense://mlflow", "/runs/mlruns", "sqlite:////proc/none/mlflow.db"])
def test_a_wrong_uri_is_said_and_training_goes_on(folder, uri):
    run = make(folder)
    train(run, 0, 5, commits=(5,)).end(0, "done")
    follow(run, uri, "test", lambda: True, Patience(poll=0.02, backoff=0.05, last_pass=0.1))
    log = (folder / "tracking" / "uploader.log").read_text()
    assert f"MLflow at {uri} does not take it, the journal keeps it, next try in 0.05 s: " in log
    assert f"waits for `fitv2 track sync {folder}`" in log and "Traceback" not in log
    assert sync(str(folder), "auto", "test")["metrics"] == 5


def test_tags_group_runs(folder):
    run = make(folder, {"model": {"depth": 40, "hidden": 2304, "heads": 24}, "seed": 7})
    gpus = [{"name": "NVIDIA H200", "uuid": str(i)} for i in range(8)]
    run.claim({"git": "0c9d", "gpus": gpus, "parameters": 2971928080, "datasets": ["5f", "6e"]})
    sync(str(folder), "auto", "test")
    tags = published(folder)["tags"]
    assert {name: tags[f"fitv2.{name}"] for name in ("family", "parameters", "dataset", "seed", "git", "gpu")} == {
        "family": "3B/2", "parameters": "2971928080", "dataset": "5f,6e", "seed": "7", "git": "0c9d",
        "gpu": "8 x NVIDIA H200",
    }  # fmt: skip


def test_families_are_those_of_the_configs():
    named = {"s2": "S/2", "b2": "B/2", "l2": "L/2", "xl2": "XL/2", "3b2": "3B/2", "demo": "6x160"}
    configs = Path(__file__).parent.parent / "configs"
    for name, expected in named.items():
        (file,) = configs.glob(f"*{'fitv2_' if name != 'demo' else ''}{name}.yaml")
        assert family(yaml.safe_load(file.read_text())["model"]) == expected


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


def test_on_a_shared_file_system_sync_is_the_one_writer(folder, runs, tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n22 21 0:9 / {runs} rw - nfs4 filer:/x rw\n")
    monkeypatch.setattr(target, "_MOUNTS", mounts)
    run = make(folder, {"tracking": {"uri": "auto"}})
    attempt = train(run, 0, 5, commits=(5,))
    assert "stay in the journal; `fitv2 track sync" in why_journal_only(run.url, "auto")
    assert why_journal_only(run.url, "http://mlflow:5000") is None

    uri = resolve_uri(run.url, "auto")
    other = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('process 7 on n1', file=f, flush=True); print(flush=True); sys.stdin.read()"  # noqa: E501
    command = [sys.executable, "-c", other, str(runs / "mlflow.db.writer")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match=r"process 7 on n1 writes to .*mlflow.db; try again when it is done"):
            sync(run.url, uri, "test", Patience(last_pass=0.2))
        process.stdin.close()
    sync(run.url, uri, "test")
    assert published(folder)["status"] == "RUNNING"  # no uploader there would hold the lock
    attempt.end(75, "SIGTERM")
    sync(run.url, uri, "test")
    assert published(folder)["status"] == "KILLED"


def test_sync_follows_a_run_until_it_is_done(folder):
    """From another machine, over several attempts, without a process to watch."""
    run = make(folder)
    follower = threading.Thread(target=follow, args=(run, resolve_uri(str(folder), "auto"), "test"), kwargs={
        "over": lambda: run_is_over(run), "patience": QUICK,
    })  # fmt: skip
    follower.start()
    train(run, 0, 5, commits=(5,)).end(75, "SIGUSR1")
    wait("what is sent", (folder / "tracking" / "ack.json").exists)
    assert follower.is_alive()
    train(run, 5, 10, commits=(10,)).end(0, "done")
    follower.join(300)
    assert not follower.is_alive()
    assert steps(folder) == list(range(1, 11)) and published(folder)["status"] == "FINISHED"
