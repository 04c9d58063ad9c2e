"""The figures: 2,000K steps into a real server, an outage of ten minutes, and what a server costs training's steps."""

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from tests.services.mlflow_server import MlflowServer
from tests.support.journal_writers import make
from tests.support.mlflow_queries import Database, check_child, check_curves
from tests.support.simulated_trainer import start_trainer, uploader_of
from tests.support.waiting import wait

pytestmark = [pytest.mark.mlflow, pytest.mark.timeout(1800)]


@pytest.fixture
def server(tmp_path):
    server = MlflowServer(tmp_path)
    server.start()
    server.wait()
    yield server
    server.stop()


@pytest.mark.parametrize("steps", [10_000, pytest.param(2_000_000, marks=pytest.mark.long)])
def test_two_million_steps(server, tmp_path, steps):
    """The default window and 30 curves: 1.2 million points, and a child's 20,000. A few of them in the short suite."""
    run = make(tmp_path / "run")
    began = time.monotonic()
    trainer = start_trainer(tmp_path / "run", server.uri, 0, steps, 30, "end")
    a_step, a_record = map(float, trainer.communicate()[0].split())
    database = Database(server, run)
    wait("the end", lambda: database.canonical() and database.status(database.canonical()) == "FINISHED", 1500)
    seconds = time.monotonic() - began
    check_curves(database, run, steps)
    check_child(database, run, 1, "FINISHED")
    with_wal = sum(file.stat().st_size for file in server.folder.glob("mlflow.db*"))
    query = f"{server.uri}/ajax-api/2.0/mlflow/metrics/get-history-bulk-interval"
    query += f"?run_ids={database.canonical()}&metric_key=loss&max_results=320"
    asked = []
    for _ in range(5):
        moment = time.perf_counter()
        with urllib.request.urlopen(query) as reply:
            points = json.load(reply)["metrics"]
        asked.append(time.perf_counter() - moment)
    largest = max(f.stat().st_size for f in (tmp_path / "run").glob("attempts/1/journal/*.jsonl"))
    print(
        f"\n{seconds:.0f} s, {with_wal / 1e6:.0f} MB, {len(points)} points of the history in {max(asked):.2f} s, "
        f"p99 {a_step:.1f} µs a step and {a_record:.1f} a record, largest segment {largest / 1e3:.0f} kB"
    )
    assert len(points) >= min(320, steps // 50)
    assert steps < 2_000_000 or (seconds <= 600 and with_wal <= 400e6 and max(asked) < 1 and a_step <= 50)


@pytest.mark.long
def test_an_outage_of_ten_minutes(server, tmp_path):
    """The server is gone for ten minutes in the middle; the uploader is killed while it is, and the trainer too."""
    run, steps = make(tmp_path / "run"), 100_000
    database = Database(server, run)
    trainer = start_trainer(tmp_path / "run", server.uri, 0, 60_000, 12, "hang")
    wait("4000 points", lambda: database.count() > 4000)
    server.stop()
    stopped = time.monotonic()
    os.kill(uploader_of(trainer), signal.SIGKILL)
    time.sleep(200)
    trainer.kill()  # its uploader gives up two minutes later
    trainer.wait()
    second = start_trainer(tmp_path / "run", server.uri, 60_000, steps, 12, "hang")
    time.sleep(600 - (time.monotonic() - stopped))
    server.start()
    server.wait()
    wait("all points", lambda: database.count() == 12 * steps // 50)
    second.kill()
    second.wait()
    wait("the end", lambda: database.status(database.canonical()) == "KILLED")
    check_curves(database, run, steps, measured=steps + 500)
    check_child(database, run, 1, "KILLED")
    check_child(database, run, 2, "KILLED")


STEPS = """
import os, sys, time, torch
from fitv2_scale.run.run import Run
from fitv2_scale.tracking.journal import Journal
from fitv2_scale.tracking.uploader_process import Uploader

run = Run.open(sys.argv[1])
attempt = run.claim({})
journal, uploader = Journal(attempt.folder, 1, 0), Uploader(sys.argv[1], sys.argv[2], "test")
os.sched_setaffinity(0, {0})  # not the uploader, which was started before
a = torch.randn(700, 700)
step = 0
while True:
    began = time.perf_counter()
    for _ in range(3):
        a @ a
    step += 1
    journal.metrics(step, {f"curve{i}": float(step) for i in range(30)})
    uploader.check()
    print(time.time(), time.perf_counter() - began, flush=True)
    if step % 200 == 0:
        journal.seal()
        attempt.commit(step, f"steps/{step}", "sha256:00")
"""


@pytest.mark.parametrize("times,seconds", [(1, 1), pytest.param(8, 20, marks=pytest.mark.long)])
def test_a_server_that_comes_and_goes_costs_the_steps_nothing(tmp_path, times, seconds):
    """One run; the server answers for 20 s and does not for 20 s, eight times. It stands for another machine, so server
    and trainer have a core each; the uploader, at the lowest priority of them, takes what is free of both. The short
    suite does it once for a second, which measures nothing."""
    server = MlflowServer(tmp_path)
    server.start()
    server.wait()
    server.keep_to({1})
    make(tmp_path / "run")
    command = [sys.executable, "-c", STEPS, str(tmp_path / "run"), server.uri]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    rows: list[tuple[float, float]] = []

    def listen() -> None:
        for line in trainer.stdout:
            rows.append(tuple(map(float, line.split())))

    listener = threading.Thread(target=listen)
    listener.start()
    periods: list[tuple[float, float, bool]] = []
    try:
        wait("what is sent", (tmp_path / "run" / "tracking" / "ack.json").exists, 600)
        for up in [True, False] * times:
            server.resume() if up else server.pause()
            time.sleep(1)
            begin = time.time()
            time.sleep(seconds)
            periods.append((begin, time.time(), up))
    finally:
        trainer.kill()
        listener.join()
        server.stop()
    took = {
        up: [seconds for at, seconds in rows if any(b < at < e for b, e, is_up in periods if is_up == up)]
        for up in (True, False)
    }
    medians = {up: statistics.median(values) for up, values in took.items()}
    difference = abs(medians[True] / medians[False] - 1)
    print(f"\nmedian {medians[True] * 1e3:.3f} ms with, {medians[False] * 1e3:.3f} ms without: {difference:.2%}")
    assert times == 1 or difference < 0.005
