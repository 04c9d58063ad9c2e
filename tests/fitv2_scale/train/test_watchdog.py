"""A hung rank is named, and the attempt ends with 75: real ranks, really stopped."""

import json
import os
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from fitv2_scale.train.loop import train
from fitv2_scale.train.watchdog import Beat, Hung, Watchdog, find_hung, writer_of
from tests.support.ranks import Ranks
from tests.support.run_history import reach
from tests.support.tiny_runs import make_tiny

LIMITS = {"step": 8.0, "compile": 30.0, "load": 60.0, "save": 60.0}  # all shorter than a test waits
STRICT = {f"watchdog__{phase}_seconds": seconds for phase, seconds in LIMITS.items()}
STRICT |= {"train__steps": 100_000, "checkpoint__every_steps": 50_000}


def beat(rank: int, phase: str = "step", step: int = 7, patience: float = 30.0, where: str = "a.py:1", **rest) -> Beat:
    return Beat(rank, f"n{rank}", phase, step, 40.0, patience, where, **{"begun": {"a": 9}, "still": 20.0} | rest)


@pytest.mark.parametrize(
    "beats,unheard,guilty",
    [
        ([beat(0), beat(1), beat(2)], [0, 31, 1], [1]),  # silent
        ([beat(0), beat(1, "save", patience=1800), beat(2)], [0, 31, 1], [1]),  # patient, but in another phase
        ([beat(0), beat(1, step=6), beat(2)], [0, 1, 1], [1]),  # behind
        ([beat(0), beat(1, "data"), beat(2)], [0, 1, 1], [1]),  # in another phase
        ([beat(0), beat(1, where="b.py:1"), beat(2)], [0, 1, 1], [1]),  # at another line
        ([beat(0), beat(1, where="b.py:1")], [0, 1], [0, 1]),  # which of two cannot be told
        ([beat(0), beat(1, where="b.py:1", begun={"a": 8})], [0, 1], [1]),  # but the other one waits in a collective
        ([beat(0), beat(1, begun={"a": 8}), beat(2, "data", step=6)], [0, 1, 1], [1]),  # that is surer than a step
        ([beat(0, still=0.5), beat(1, where="b.py:1", begun={"a": 8})], [0, 1], [0, 1]),  # which it had not begun then
        ([beat(0, "save"), beat(1, "save")], [0, 1], [0, 1]),  # all wait for something outside
        ([beat(0, step=6), beat(1)], [0, 31], [1]),  # silence counts first
    ],
)
def test_who_is_to_find_hung(beats, unheard, guilty):
    found = find_hung({b.rank: b for b in beats}, dict(enumerate(map(float, unheard))))
    assert [h.rank for h in found] == guilty


def test_what_the_alarm_says():
    (hung,) = find_hung({0: beat(0), 1: beat(1)}, {0: 0.0, 1: 31.4})
    assert str(hung) == "rank 1 on n1 has not been heard from for 31 s, at step 7, in a.py:1"
    (hung,) = find_hung({0: beat(0), 1: beat(1, "data", 6)}, {0: 0.0, 1: 0.4})
    assert str(hung) == "rank 1 on n1 has been in phase data for 40 s, at step 6, in a.py:1"


@pytest.mark.parametrize(
    "hung,writer",
    [
        ({}, 0),
        ({0: True}, 1),
        ({0: False}, 1),  # stopped a moment ago: it could not write
        ({1: True}, 0),
        ({0: True, 1: False, 2: False}, 1),  # all hang, two of them are heard
        ({0: True, 1: True, 2: True}, None),
    ],
)
def test_who_writes_the_end(hung, writer):
    found = [Hung(rank, "n", "step", 7, 9.0, silent, "") for rank, silent in hung.items()]
    assert writer_of({0, 1, 2}, found) == writer


def test_a_watch_that_fails_waits_before_it_looks_again():
    """Else it would take a core from training, and fill the log."""
    ended, looked, again = threading.Event(), threading.Event(), threading.Event()

    def fail() -> None:
        (again if looked.is_set() else looked).set()
        raise OSError("unexpected")

    watchdog = object.__new__(Watchdog)
    watchdog.__dict__.update(_ended=ended, _interval=1e6, _look=fail)
    thread = threading.Thread(target=watchdog._watch)
    thread.start()
    try:
        assert looked.wait(60) and not again.wait(0.5)
    finally:
        ended.set()
        thread.join(60)
    assert not thread.is_alive()


def end_of(run: str, seconds: float = 240) -> dict:
    file, deadline = Path(run, "attempts/1/end.json"), time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < deadline, "the watchdog has not barked"
        time.sleep(0.1)
    return json.loads(file.read_text())


@pytest.mark.parametrize("stopped", [0, 2])
def test_a_stopped_rank_is_named(tiny, stopped):
    config = tiny(**STRICT)
    ranks = Ranks(3, train, config)
    try:
        reach(config.run, 5, attempt=1)
        time.sleep(3)  # what it says in its first steps is that it compiles, and may be silent for long
        ranks.signal(stopped, signal.SIGSTOP)
        end = end_of(config.run)
        assert end["code"] == 75 and end["reason"].startswith(f"rank {stopped} on "), end
        assert "has not been heard from" in end["reason"]
        (hung,) = json.loads(Path(config.run, "attempts/1/hung.json").read_text())
        assert (hung["rank"], hung["node"], hung["silent"]) == (stopped, socket.gethostname(), True)
        stacks = sorted(p.name for p in Path(config.run, "attempts/1/logs").glob("*.stacks"))
        assert stacks == [f"rank-{rank:05d}.stacks" for rank in range(3) if rank != stopped]
        text = Path(config.run, "attempts/1/logs", stacks[0]).read_text()
        recorded = json.loads(
            Path(config.run, "attempts/1/logs", stacks[0].replace(".stacks", ".gloo.json")).read_text()
        )
        assert recorded["entries"][-1]["profiling_name"].startswith("gloo:")  # what it waits for
        assert "in _loop" in text and "watchdog.py" in text  # the main thread and this one
        ranks.signal(stopped, signal.SIGCONT)  # as srun does to what it ends: it must not accuse the others now
        codes = [ranks.exit_code(rank, 30) for rank in range(3) if rank != stopped]
        assert codes == [75, 75] and ranks.exit_code(stopped, 30) == 75
        assert end_of(config.run) == end
        assert status(Run.open(config.run))["attempts"][0]["code"] == 75
    finally:
        ranks.kill()


def test_ranks_that_are_suspended_together_continue(tiny):
    """As by `scontrol suspend`, for longer than a step may take."""
    config = tiny(**STRICT)
    ranks = Ranks(2, train, config)
    try:
        reach(config.run, 5, attempt=1)
        time.sleep(3)
        for number, pause in ((signal.SIGSTOP, 12), (signal.SIGCONT, 0)):
            for rank in range(2):
                ranks.signal(rank, number)
            time.sleep(pause)
        file = Path(config.run, "attempts/1/audit/rank-00000.jsonl")
        reach(config.run, json.loads(file.read_text().splitlines()[-2])["step"] + 50, attempt=1)
        time.sleep(10)
        ranks.terminate(0)
        assert ranks.results() == [75, 75]
        assert end_of(config.run)["reason"].startswith("SIGTERM: saved at step")
    finally:
        ranks.kill()


def test_a_rank_that_never_returns_from_a_step_is_named(dataset, tmp_path):
    """It lives and is heard, and the other one waits for it in the same phase of the same step."""
    config = make_tiny(dataset, tmp_path, **STRICT)
    ranks = Ranks(2, train_to_a_standstill, config)
    try:
        end = end_of(config.run)
        assert end["code"] == 75 and end["reason"].startswith("rank 1 on "), end
        assert "has been in phase step" in end["reason"] and "at step 6, in loop.py:" in end["reason"]
        (hung,) = json.loads(Path(config.run, "attempts/1/hung.json").read_text())
        assert (hung["rank"], hung["node"], hung["silent"]) == (1, socket.gethostname(), False)
        assert "train_to_a_standstill" in Path(config.run, "attempts/1/logs/rank-00001.stacks").read_text()
    finally:
        ranks.kill()


def train_to_a_standstill(config) -> int:
    import fitv2_scale.parallel.world as world
    import fitv2_scale.train.loop as module

    world._TIMEOUT = timedelta(seconds=4)  # shorter than what a step may take: the watchdog has to lengthen it
    step = module.train_step

    def sleep(engine, batch, *rest):
        if batch.step == 6 and os.environ["RANK"] == "1":
            time.sleep(1000)
        return step(engine, batch, *rest)

    module.train_step = sleep
    return train(config)
