"""Every errno of errno.h on the journal: nothing that is recorded ends training or is lost. Only ``seal``, so a save,
waits for the disk, and fails in one sentence."""

import errno
import os
from dataclasses import replace

import pytest

from data_sharding.storage import files
from data_sharding.storage import retry as retry_module
from fitv2_scale.run.run import Attempt
from fitv2_scale.tracking import journal
from fitv2_scale.tracking.journal import Journal
from tests.support.errnos import WRITES, kind_of, outcome
from tests.support.faulty_disk import FaultyDisk
from tests.support.journal_writers import DIGEST, curve, make


@pytest.fixture
def disk(monkeypatch) -> FaultyDisk:
    monkeypatch.setattr(retry_module, "_FIRST_PAUSE", 0.0005)
    monkeypatch.setattr(retry_module, "_LONGEST_PAUSE", 0.001)
    monkeypatch.setattr(files, "_LOCAL", replace(files._LOCAL, deadline=0.004))
    monkeypatch.setattr(journal, "_FLUSH_EVERY_S", 0.0)
    return FaultyDisk(monkeypatch)


def begun_journal(attempt: Attempt) -> Journal:
    """Its first line, which it writes in the background, is on the disk."""
    log = Journal(attempt.folder, 1, 0)
    log._flushing.result()
    log.seal()
    return log


def recorded(log: Journal, step: int) -> None:
    """Recorded, and tried to be written."""
    log.metrics(step, {"loss": 1.0})
    log._flushing.result()


@pytest.mark.parametrize(
    ("point", "begun"), [("open", False), ("write", False), ("write", True), ("fsync", False), ("fsync", True)]
)
def test_what_each_errno_comes_to_and_that_nothing_is_lost(tmp_path, disk, point, begun):
    """``begun``: the segment's file is open when the trouble comes."""
    run = make(tmp_path)
    attempt = run.claim({})
    disk.fail(0, ".jsonl")
    log, step, wrong = begun_journal(attempt), 0, {}
    for number, code in errno.errorcode.items():
        if begun:
            recorded(log, step := step + 1)
        disk.fail(number, ".jsonl", point)
        recorded(log, step := step + 1)
        found = outcome(log.seal)
        expected = "none" if number in (errno.ENOENT, errno.ENOTDIR) else WRITES[kind_of(number)]
        if disk.met == 0 or found != expected:
            wrong[code] = found if disk.met else "not met"
        disk.fail(0, ".jsonl")
        log.seal()
    assert not wrong
    attempt.commit(step, f"steps/{step}", DIGEST)
    assert [found for found, _ in curve(run)] == list(range(1, step + 1))


def test_trouble_that_passes_fails_no_save(tmp_path, disk, monkeypatch):
    run = make(tmp_path)
    attempt = run.claim({})
    monkeypatch.setattr(files, "_LOCAL", replace(files._LOCAL, deadline=60.0))
    log = begun_journal(attempt)
    for step, point in enumerate(("open", "write", "fsync"), 1):
        disk.fail(errno.EIO, ".jsonl", point, times=2)
        log.metrics(step, {"loss": 1.0})
        log.seal()
        assert disk.met == 2
    attempt.commit(3, "steps/3", DIGEST)
    assert [found for found, _ in curve(run)] == [1, 2, 3]


def test_a_file_that_will_never_work_again_is_opened_again(tmp_path, disk, caplog):
    """As on NFS and FUSE after an outage; what was written to it before an fsync failed may be gone, too."""
    run = make(tmp_path)
    attempt = run.claim({})
    disk.fail(0, ".jsonl")
    log = begun_journal(attempt)
    recorded(log, 1)
    stale, file = log._file, attempt.folder / "journal/00001.jsonl"
    disk.fail(errno.ESTALE, ".jsonl", "write", "fsync")
    for step in (2, 3):
        recorded(log, step)
    assert [r.message for r in caplog.records if "training continues" in r.message] == [caplog.messages[0]]  # once
    os.truncate(file, 5)  # of what no fsync has confirmed
    disk.fail(0, ".jsonl")
    log.seal()
    assert stale.closed
    attempt.commit(3, "steps/3", DIGEST)
    assert [found for found, _ in curve(run)] == [1, 2, 3]
