"""Training on storage that fails: what passes is waited for; else what is done is saved, and the code is 75. Nothing
ends without a word."""

import errno
import os
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from fsspec.implementations.local import LocalFileSystem

from data_sharding.storage import files
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.retry import RetryPolicy
from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from fitv2_scale.train.loop import DONE, RETRY, train
from tests.support.commits import commit_bytes
from tests.support.faulty_disk import FaultyDisk
from tests.support.ranks import run_ranks
from tests.support.run_history import losses, trained

# The whole dataset does not stay in memory, so frames are read again and again.
READS_AGAIN = {"data__cache_gib": 0.0005, "data__prefetch_gib": 0.0005, "data__deadline_seconds": 1.0}


def failing(number: int, after: int, seconds: float, call: Callable, concerns: Callable[..., bool]) -> Callable:
    """``call``, which raises OSError(number) for so long once ``after`` calls that are concerned were made."""
    met: list[float] = []

    def act(*args, **kw):
        if concerns(*args):
            met.append(time.monotonic())
            if len(met) > after and met[-1] - met[after] < seconds:
                raise OSError(number, os.strerror(number), str(args[1]))
        return call(*args, **kw)

    return act


def train_on_shards_that_fail(config, name: str, after: int, seconds: float, ranks: tuple[int, ...]) -> int:
    if int(os.environ["RANK"]) in ranks:
        number, read = getattr(errno, name), LocalFileSystem.cat_file
        is_shard = lambda _, path, *rest: str(path).endswith(".tar.zst")  # noqa: E731
        LocalFileSystem.cat_file = failing(number, after, seconds, read, is_shard)
    return train(config)


def train_on_a_run_that_fails(config, name: str, after: int, seconds: float, where: str) -> int:
    """Writes of objects whose path begins with ``where`` fail."""
    LocalStore.__init__.__defaults__ = (RetryPolicy(deadline=1.0),)
    begins = lambda _, path: path.startswith(where)  # noqa: E731
    LocalStore._destination = failing(getattr(errno, name), after, seconds, LocalStore._destination, begins)
    return train(config)


@pytest.mark.parametrize("name", ["ESHUTDOWN", "EACCES"])
def test_training_waits_for_shards(tiny, name):
    """ESHUTDOWN is a BrokenPipeError in Python: no closed pager ends training."""
    undisturbed = tiny("undisturbed", **READS_AGAIN)
    config = tiny("run", **READS_AGAIN | {"data__deadline_seconds": 60.0})
    assert run_ranks(1, train, undisturbed) == [DONE]
    assert run_ranks(1, train_on_shards_that_fail, config, name, 6, 2.0, (0,)) == [DONE]
    assert commit_bytes(config.run) == commit_bytes(undisturbed.run)


@pytest.mark.parametrize(("name", "ranks"), [("ENOTCONN", (1,)), ("EKEYEXPIRED", (0, 1)), ("EIO", (0,))])
def test_if_shards_stay_away_what_is_done_is_saved(tiny, name, ranks):
    """The manifest can still be read: no frame is lost, whatever its errno."""
    config = tiny("run", train__steps=2000, checkpoint__every_steps=10**6, **READS_AGAIN)
    assert run_ranks(2, train_on_shards_that_fail, config, name, 12, 1e6, ranks) == [RETRY, RETRY]
    report = status(Run.open(config.run))
    (attempt,) = report["attempts"]
    assert attempt["code"] == RETRY and "cannot be reached" in attempt["why"]
    assert os.strerror(getattr(errno, name)) in attempt["why"] and not report["substituted"]["frames"]
    done = attempt["last_step"]
    assert done > 0 and sorted(losses(config.run)) == list(range(1, done + 1)) == [s + 1 for s in trained(config.run)]


@pytest.mark.parametrize(("name", "where"), [("ENODEV", "steps/"), ("EREMOTEIO", "log/"), ("ENOSPC", "steps/")])
def test_a_failed_save_at_the_end_is_tried_again(tiny, name, where):
    config = tiny("run", checkpoint__every_steps=6)
    after = 1 if where == "log/" else 0  # the CLAIM
    assert run_ranks(1, train_on_a_run_that_fails, config, name, after, 1.5, where) == [DONE]
    assert [entry.fields["step"] for entry in Run.open(config.run).log.commits()] == [6]


def train_on_a_journal_that_fails(config, name: str, times: float) -> int:
    files._LOCAL = replace(files._LOCAL, deadline=1.0)
    FaultyDisk(pytest.MonkeyPatch()).fail(getattr(errno, name), "/journal/", "open", "write", "fsync", times=times)
    return train(config)


@pytest.mark.parametrize("name", ["EIO", "ENOSPC"])
def test_a_journal_that_cannot_be_written_fails_saves(tiny, name):
    """Until it can: then no measurement is missing."""
    config = tiny("run", checkpoint__every_steps=2, checkpoint__max_failed=2)
    assert run_ranks(1, train_on_a_journal_that_fails, config, name, 1e9) == [RETRY]
    report = status(Run.open(config.run))
    assert "/journal/00000.jsonl cannot be" in report["attempts"][0]["why"] and report["last_commit"] is None
    assert run_ranks(1, train_on_a_journal_that_fails, config, name, 1) == [DONE]
    assert sorted(losses(config.run)) == list(range(1, 7))


def test_a_run_that_cannot_be_written_any_more(tiny):
    config = tiny("run", checkpoint__every_steps=2)
    assert run_ranks(1, train_on_a_run_that_fails, config, "EROFS", 2, 1e6, "steps/") == [RETRY]
    report = status(Run.open(config.run))
    assert report["last_commit"]["step"] > 0 and "Read-only file system" in report["attempts"][0]["why"]


def test_a_run_that_cannot_be_written_at_all(tiny):
    from data_sharding.errors import StorageDown, UserError

    config = tiny("run")
    with pytest.raises(UserError, match="cannot be used: .*Read-only file system.*check who owns it") as refused:
        run_ranks(1, train_on_a_run_that_fails, config, "EROFS", 0, 1e6, "")
    assert not isinstance(refused.value, StorageDown)
    assert run_ranks(1, train_on_a_run_that_fails, config, "ENOSPC", 0, 1e6, "") == [RETRY]
