"""`fitv2 stop` and `save` on storage that fails, for every errno of errno.h: one sentence and code 2, and nothing was
requested; or, where the trouble passes, the request is made."""

import errno

import pytest

from data_sharding.storage import retry as retry_module
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.retry import RetryPolicy
from fitv2_scale.cli.__main__ import main
from fitv2_scale.run.requests import save_request_path
from fitv2_scale.run.run import Run
from tests.support.faulty_disk import FaultyDisk

SOME = (errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO, errno.ESHUTDOWN)
# Command, part of the paths that fail, points at which they do: at the first with every errno.
CASES = [
    ("stop", "/log/.0000", ["open", "write", "fsync"]),
    ("stop", "/log/0000", ["link"]),
    ("save", "attempts/1/.save", ["open", "write", "fsync"]),
    ("save", "attempts/1/save", ["replace"]),
    ("stop", "run.json", ["open", "read"]),
    ("save", "/log/0000", ["read"]),
]


@pytest.fixture
def running(tmp_path, monkeypatch) -> Run:
    """A run whose attempt runs; storage is waited for only a moment."""
    monkeypatch.setattr(retry_module, "_FIRST_PAUSE", 0.0005)
    monkeypatch.setattr(LocalStore.__init__, "__defaults__", (RetryPolicy(deadline=0.002),))
    monkeypatch.setenv("PATH", "")  # no Slurm
    run = Run.open_or_create(str(tmp_path / "run"), {}, {}, None)
    run.claim({})
    return run


def is_requested(run: Run) -> bool:
    return Run.open(run.url).log.stop_requested() or run.store.exists(save_request_path(1))


@pytest.mark.parametrize(("command", "part", "points"), CASES, ids=[f"{case[0]} {case[1]}" for case in CASES])
def test_a_request_that_cannot_be_made_is_one_sentence(running, monkeypatch, capsys, command, part, points):
    disk = FaultyDisk(monkeypatch)
    for point in points:
        for number in errno.errorcode if point == points[0] else SOME:
            disk.fail(number, part, point)
            found, printed, code = main([command, running.url]), capsys.readouterr(), errno.errorcode[number]
            assert disk.met, (code, point)
            assert found == 2 and printed.err.startswith("fitv2: ") and printed.err.count("\n") == 1, (
                code,
                point,
                printed,
            )
            assert printed.out == "", (code, point)
            disk.fail(0, part)
            assert not is_requested(running), (code, point)


@pytest.mark.parametrize(("command", "part"), [("stop", "/log/.0000"), ("save", "attempts/1/.save")])
def test_trouble_that_passes_is_waited_for(running, monkeypatch, capsys, command, part):
    monkeypatch.setattr(LocalStore.__init__, "__defaults__", (RetryPolicy(deadline=60.0),))
    disk = FaultyDisk(monkeypatch)
    for number in (errno.EIO, errno.ESHUTDOWN, errno.ENOTCONN):
        disk.fail(number, part, "open", times=2)
        assert main([command, running.url]) == 0 and disk.met == 2
    assert is_requested(running) and capsys.readouterr().err == ""
