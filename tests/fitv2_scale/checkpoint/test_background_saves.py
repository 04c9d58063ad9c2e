"""Saving while training continues: each commit holds the state of its step, in order, and failures are acted on."""

import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import fitv2_scale.train.loop as module
from fitv2_scale.checkpoint import checkpointer, commit_files
from fitv2_scale.checkpoint.commit_files import CommitWriter
from fitv2_scale.checkpoint.staging import Staging
from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from fitv2_scale.tracking import journal as journal_module
from fitv2_scale.tracking.journal import Journal, read
from fitv2_scale.train.loop import DONE, GIVE_UP, RETRY, train
from fitv2_scale.train.session import Session
from tests.support.commits import all_commits, commit_bytes
from tests.support.ranks import Ranks, run_ranks
from tests.support.run_history import losses, reach
from tests.support.waiting import wait

EVERY_COMMIT = {"checkpoint__keep_last": 99, "train__audit": False}


def steps_of(config) -> list[int]:
    return [e.fields["step"] for e in Run.open(config.run).log.commits()]


def slow(function: Callable, seconds: float) -> Callable:
    def act(*args, **kw):
        time.sleep(seconds)
        return function(*args, **kw)

    return act


def train_slowly(config) -> tuple[int, int, int]:
    """Trains with saves that copy slowly, and write until training has gone on by a step. Returns the exit code, the
    steps taken while a save was in flight, and the most writers that there were at once."""
    Staging.copy, step = slow(Staging.copy, 0.2), module.train_step
    overlapping, writers, most, done = 0, 0, 0, 0
    write_commit = checkpointer.write_commit

    def writing(run, folder, *args):
        nonlocal writers, most
        writers += 1
        most, before = max(most, writers), overlapping
        # The last step may be over before the save of the one before it begins to write.
        wait("a step", lambda: overlapping > before or done == config.train.steps)
        writers -= 1
        return write_commit(run, folder, *args)

    def counted(engine, batch, *rest):
        nonlocal overlapping, done
        result = step(engine, batch, *rest)
        overlapping += writers > 0
        done = batch.step + 1
        return result

    checkpointer.write_commit, module.train_step = writing, counted
    return train(config), overlapping, most


def train_blocking(config) -> int:
    """Trains with each save finished before anything else is done, and of what the engine holds at that time."""
    save = Session.save
    Session.save = lambda self, step, start, last, accounting: save(self, step, start, last or start, accounting)
    checkpointer.Checkpointer._live = property(lambda self: self._engine.boxes())
    return train(config)


@pytest.mark.parametrize(
    "engine,size,layout",
    [("fsdp", 2, {}), ("fsdp", 4, {"replicate": 2}), ("zero3", 2, {}), ("fsdp", 2, {"tensor": 2})],
)
def test_each_commit_is_the_state_of_its_step(tiny, engine, size, layout):
    """Bit for bit what saves write for which training stands still; in order, never two at once."""
    changes = {f"layout__{key}": value for key, value in layout.items()} | {"layout__engine": engine}
    changes |= {"train__steps": 7, "checkpoint__every_steps": 2, **EVERY_COMMIT}
    slow, blocking = tiny("slow", **changes), tiny("blocking", **changes)
    ranks = run_ranks(size, train_slowly, slow)
    assert run_ranks(size, train_blocking, blocking) == [DONE] * size
    assert steps_of(slow) == steps_of(blocking) == [2, 4, 6, 7]
    assert all_commits(slow.run) == all_commits(blocking.run)
    assert losses(slow.run) == losses(blocking.run)
    for code, overlapping, most in ranks:
        assert code == DONE and overlapping > 0 and most == 1


def train_failing(config, step: int, rank: int) -> tuple[int, list[int]]:
    """The data of the save after ``step`` steps cannot be written by one rank. Returns code and steps taken."""
    write, train_step, taken = CommitWriter.write_data, module.train_step, []

    def act(self, *args):
        if self._folder.startswith(f"steps/{step:08d}") and self._rank == rank:
            raise OSError(28, "No space left on device")
        return write(self, *args)

    def counted(engine, batch, *rest):
        taken.append(batch.step)
        return train_step(engine, batch, *rest)

    CommitWriter.write_data, module.train_step = act, counted
    return train(config), taken


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_fails_is_reported_and_training_continues(tiny, rank):
    config = tiny(train__steps=9, checkpoint__every_steps=3, **EVERY_COMMIT)
    assert run_ranks(2, train_failing, config, 3, rank) == [(DONE, list(range(9)))] * 2
    assert steps_of(config) == [6, 9]
    failed = [(r.step, r.metrics["failed_saves"]) for r in read(Run.open(config.run)) if "failed_saves" in r.metrics]
    assert failed == [(3, 1)]
    assert not list(Path(config.run, "steps").glob("00000003*"))  # what it had written is free again


def test_a_last_save_that_fails_asks_for_another_attempt(tiny):
    config = tiny(train__steps=6, checkpoint__every_steps=3, **EVERY_COMMIT)
    assert [code for code, _ in run_ranks(2, train_failing, config, 6, 1)] == [RETRY] * 2
    assert steps_of(config) == [3]
    assert status(Run.open(config.run))["attempts"][0]["why"].startswith("the save at step 6 failed: ")
    assert run_ranks(2, train, config) == [DONE] * 2
    assert steps_of(config) == [3, 6]


def train_elsewhere(config, damage: str) -> int:
    """The file of rank 1 is written, and then is not what rank 0 finds."""
    write_safetensors = commit_files.write_safetensors

    def write(store, path, entries, *rest):
        written = write_safetensors(store, path, entries, *rest)
        if path.endswith("rank-00001.safetensors") and "/00000004." in path:
            file = Path(store.path(path))
            os.truncate(file, 1000) if damage == "has 1000 bytes there" else file.unlink()
            if damage == "is removed by a newer attempt":
                Run.open(config.run).claim({})
        return written

    commit_files.write_safetensors = write
    return train(config)


@pytest.mark.parametrize("damage", ["is not there", "has 1000 bytes there"])
def test_nothing_is_committed_unless_rank_0_sees_all_files(tiny, damage):
    config = tiny(train__steps=6, checkpoint__every_steps=2, **EVERY_COMMIT)
    assert run_ranks(2, train_elsewhere, config, damage) == [DONE, DONE]
    assert steps_of(config) == [2, 6]
    said = Path(config.run, "attempts/1/logs/rank-00000.log").read_text()
    assert re.search(rf"the save at step 4 failed: \S+/rank-00001.safetensors {damage}.*do all nodes share", said)


def test_files_that_a_newer_attempt_has_removed_are_no_fault_of_the_nodes(tiny):
    config = tiny(train__steps=6, checkpoint__every_steps=2, **EVERY_COMMIT)
    assert run_ranks(2, train_elsewhere, config, "is removed by a newer attempt") == [GIVE_UP] * 2
    first, _ = status(Run.open(config.run))["attempts"]
    assert steps_of(config) == [2] and "superseded by attempt 2" in first["why"]
    said = [file.read_text() for file in Path(config.run).glob("attempts/1/logs/*.log")]  # none, if nothing was logged
    assert "share this place" not in "".join(said)


def train_superseded(config) -> int:
    """Before its first COMMIT, another attempt claims the run."""
    write_commit = checkpointer.write_commit

    def act(run, folder, header, plan, ranks):
        if ranks.rank == 0:
            Run.open(config.run).claim({})
        return write_commit(run, folder, header, plan, ranks)

    checkpointer.write_commit = act
    return train(config)


def test_a_superseded_attempt_ends_though_its_save_was_in_the_background(tiny):
    config = tiny(train__steps=10**6, checkpoint__every_steps=3, train__audit=False)
    assert run_ranks(2, train_superseded, config) == [GIVE_UP] * 2
    assert steps_of(config) == []
    first, _ = status(Run.open(config.run))["attempts"]
    assert first["code"] == GIVE_UP and "superseded by attempt 2" in first["why"]


def train_writing(config, step: int, until: str = "") -> int:
    """Trains. The save after ``step`` steps writes once the file ``until`` is there; without one, for ever."""
    write_commit = checkpointer.write_commit

    def writing(run, folder, *args):
        if folder.startswith(f"steps/{step:08d}"):
            wait("the file", Path(until).exists) if until else time.sleep(10**6)
        return write_commit(run, folder, *args)

    checkpointer.write_commit = writing
    return train(config)


def test_killed_while_it_writes(tiny):
    """The newest commit is the one before, and the run ends as if nothing had happened."""
    changes = {"train__steps": 14, "checkpoint__every_steps": 3}
    killed, undisturbed = tiny("killed", **changes), tiny("undisturbed", **changes)
    assert run_ranks(2, train, undisturbed) == [DONE] * 2
    ranks = Ranks(2, train_writing, killed, 6)
    reach(killed.run, 7, attempt=1)  # 3 is committed, or it would not have got so far; 6 is on its way
    ranks.kill()
    assert steps_of(killed) == [3]
    assert run_ranks(2, train, killed) == [DONE] * 2
    assert commit_bytes(killed.run) == commit_bytes(undisturbed.run)
    assert losses(killed.run) == losses(undisturbed.run)


def test_a_stop_while_it_writes(tiny, tmp_path):
    """The save in flight is committed, then that of the last step: what is reported as saved is saved."""
    changes = {"train__steps": 10**6, "checkpoint__every_steps": 10**6, "checkpoint__milestones": [3]}
    config, told = tiny(**changes), tmp_path / "told"
    ranks = Ranks(2, train_writing, config, 3, str(told))
    reach(config.run, 4, attempt=1)
    ranks.terminate(1)
    told.touch()
    assert ranks.results() == [RETRY] * 2
    run = Run.open(config.run)
    last = run.log.commits()[-1].fields["step"]
    assert steps_of(config) == [3, last] and last > 3
    assert status(run)["attempts"][0]["why"] == f"SIGTERM: saved at step {last}"
    lines = Path(config.run, "attempts/1/audit/rank-00000.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == last - 1


def train_into_a_bug(config) -> None:
    """Fails in the step after the first commit has begun, which is slow."""
    train_step, write_commit = module.train_step, checkpointer.write_commit

    def step(engine, batch, *rest):
        if batch.step == 4:
            raise RuntimeError("planned")
        return train_step(engine, batch, *rest)

    module.train_step, checkpointer.write_commit = step, slow(write_commit, 1.0)
    train(config)


def test_what_is_in_flight_when_training_fails_is_committed(tiny):
    config = tiny(train__steps=9, checkpoint__every_steps=3, **EVERY_COMMIT)
    with pytest.raises(RuntimeError, match="planned"):
        run_ranks(2, train_into_a_bug, config)
    assert steps_of(config) == [3]


def test_a_journal_that_is_sealed_while_it_is_written_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "_FLUSH_EVERY_S", 0.0)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # for more seals
    shipped = []
    journal = Journal(tmp_path, 1, 0, shipped.append)
    ended = threading.Event()

    def seal() -> None:
        while not ended.is_set():
            journal.seal()

    sealing = [threading.Thread(target=seal) for _ in range(2)]
    for thread in sealing:
        thread.start()
    for step in range(3000):
        journal.metrics(step, {"loss": 1.0})
    ended.set()
    for thread in sealing:
        thread.join()
    journal.seal()
    files = sorted((tmp_path / "journal").iterdir())
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines[1:]] == list(range(3000))
    assert shipped == files and len(files) > 1
