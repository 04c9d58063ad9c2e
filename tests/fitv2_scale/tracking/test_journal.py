"""The journal, and the canonical curve that its readers see: whatever dies, one monotone line without duplicates."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitv2_scale.tracking import journal
from fitv2_scale.tracking.journal import Journal, Position
from tests.support.journal_writers import DIGEST, curve, make, train
from tests.support.power_cut import PowerCut


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


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12), st.integers(1, 4)), min_size=1, max_size=5), st.data())
def test_reading_on_equals_reading_at_once(tmp_path_factory, plan, data):
    """However often attempts die and fall back, a reader that continues from its last position sees the one curve."""
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


def test_a_disk_that_is_full_holds_up_seal_alone(tmp_path):
    """A process whose files may not grow beyond 4 KiB, until they may: records wait, and nothing is lost."""
    code = (
        "import pathlib, resource, signal, sys\n"
        "from data_sharding.errors import UserError\n"
        "from fitv2_scale.tracking import journal\n"
        "journal._FLUSH_EVERY_S = 0.0\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "log = journal.Journal(pathlib.Path(sys.argv[1]), 1, 0)\n"
        "for step in range(1, 201): log.metrics(step, {'loss': 1.0})\n"
        "log._flushing.result(); log.metrics(201, {'loss': 1.0}); log._flushing.result()\n"
        "try: log.seal()\n"
        "except UserError as error: print(error)\n"
        "log.metrics(202, {'loss': 1.0})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "log.seal()\n"
    )
    run = make(tmp_path)
    attempt = run.claim({})
    done = subprocess.run([sys.executable, "-c", code, str(attempt.folder)], capture_output=True, text=True, check=True)
    assert "journal/00000.jsonl cannot be written: File too large; free some space" in done.stdout
    assert "the journal cannot be written yet; training continues" in done.stderr
    attempt.commit(202, "steps/202", DIGEST)
    assert [step for step, _ in curve(run)] == list(range(1, 203))


def test_what_is_sealed_outlives_a_power_cut(tmp_path, monkeypatch):
    power = PowerCut(tmp_path, monkeypatch)
    attempt = make(tmp_path).claim({})
    log = Journal(attempt.folder, 1, 0)
    for number in range(2):
        log.metrics(number + 1, {"loss": 1.0})
        assert not any(name.endswith(f"{number:05d}.jsonl") for name in power.left())
        log.seal()
    left = {name.rpartition("/")[2]: size for name, size in power.left().items() if "attempts/1/journal/" in name}
    assert left == {file.name: file.stat().st_size for file in Path(attempt.folder, "journal").iterdir()}
    assert left.keys() == {"00000.jsonl", "00001.jsonl"}


def test_the_thread_that_records_touches_no_file(tmp_path, monkeypatch):
    """Its disk hangs, and recording continues."""
    monkeypatch.setattr(journal, "_FLUSH_EVERY_S", 0.0)
    run = make(tmp_path)
    attempt = run.claim({})
    log = Journal(attempt.folder, 1, 0)
    with log._file_lock:  # what a hanging write or fsync holds
        for step in range(1, 101):
            log.metrics(step, {"loss": 1.0})
    log.seal()
    attempt.commit(100, "steps/100", DIGEST)
    assert [step for step, _ in curve(run)] == list(range(1, 101))
