"""Saves that are killed or suspended, on local disk and on S3: what counts is whole, nothing whole is lost."""

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from data_sharding.storage import s3_store
from fitv2_scale.checkpoint.restore import restore
from fitv2_scale.run.log import StaleAttempt
from fitv2_scale.run.run import Run
from tests.support.checkpoint_state import State, opened, recover, saver
from tests.support.kill_points import KillPoint, watch_disk, watch_s3
from tests.support.ranks import Ranks, run_ranks
from tests.support.run_locations import PART
from tests.support.waiting import wait

AT_ONCE = 4  # groups of ranks, of which most wait for the storage


# ---- killed ----


@contextmanager
def two_saves(env, url: str, kill_point: KillPoint, at: int | None, reads: bool) -> Iterator[Callable]:
    """Steps 2 and 3 are saved. Gives ``save``, whose next call retires step 2 and meets the kill point at ``at``."""
    watch_s3(kill_point, reads) if env else watch_disk(kill_point)
    s3_store.PART = PART
    with opened(env, url) as (world, run):
        save = saver(world, run)
        for step in (2, 3):
            assert save(step) is None
        kill_point.arm(at)
        yield save


def killed_save(env, url: str, at: int | None) -> int:
    """Dies in the save of step 4 at operation ``at``; without one, says how many there are."""
    kill_point = KillPoint()
    with two_saves(env, url, kill_point, at, reads=False) as save:
        assert save(4) is None
        return kill_point.count


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_killed_at_every_boundary_of_a_save(location, kind):
    """Each file, the manifest, COMMIT, retention: before each operation that changes something, and amid each write."""
    env, url = location(kind)
    (operations,) = run_ranks(1, killed_save, env, url("all"), None)
    assert operations >= (30 if kind == "local" else 10)
    runs = [url(str(at)) for at in range(operations)]
    for several in batched(range(operations), AT_ONCE):
        for killed in [Ranks(1, killed_save, env, runs[at], at) for at in several]:
            with pytest.raises(RuntimeError, match="died without a word"):
                killed.results()
    (found,) = run_ranks(1, recover, env, *runs)
    for at, after in enumerate(found):
        assert not after["problems"] and not after["passed_over"], f"at operation {at}: {after}"
        assert after["step"] == max(after["commits"])
    outcomes = [after["step"] for after in found]
    assert outcomes == sorted(outcomes) and set(outcomes) == {3, 4}  # one moment from which on the new commit counts


def batched(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[at : at + size] for at in range(0, len(items), size))


def save_for_ever(env, url: str) -> None:
    s3_store.PART = PART
    with opened(env, url) as (world, run):
        save, state = saver(world, run), State(-1, world)
        if commits := run.log.commits():
            newest = commits[-1].fields["step"]
            restored = restore(state, run, world)
            assert restored.step == newest and not restored.quarantined and state.is_whole(newest)
            state.step = newest
        for step in range(state.step + 1, 10**6):
            assert save(step) is None


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_killed_at_random_moments(location, kind, kills):
    """Two ranks that do nothing but save, killed and started again: each time the newest commit is whole."""
    env, url = location(kind)
    run, rng = url("run"), random.Random(0)
    Run.open_or_create(run, {}, {}, None)
    for attempt in range(1, kills + 1):
        ranks = Ranks(2, save_for_ever, env, run)
        wait("a commit", lambda n=attempt: n in [e.attempt for e in Run.open(run).log.entries() if e.kind == "COMMIT"])
        with pytest.raises(AssertionError, match="hang"):  # unless a rank met something wrong
            ranks.results(timeout=rng.uniform(0, 0.3))
    ((found,),) = run_ranks(1, recover, env, run)
    assert not found["problems"] and found["step"] > 0


# ---- suspended ----


def suspended_save(env, url: str, at: int | None) -> str | int:
    """As ``killed_save``, but suspended instead of killed; tells how it continued."""
    kill_point = KillPoint(signal.SIGSTOP)
    with two_saves(env, url, kill_point, at, reads=True) as save:
        try:
            assert save(4) is None
        except StaleAttempt:
            return "stale"
        return kill_point.count if at is None else "saved"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("races", [4, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_a_suspended_attempt_that_wakes_up_harms_nothing(location, kind, races):
    """It stops anywhere in its save; another attempt claims the run and saves; it wakes up."""
    env, url = location(kind)
    (operations,) = run_ranks(1, suspended_save, env, url("all"), None)
    moments = [0, *random.Random(races).choices(range(operations), k=races - 1)]  # 0: certainly stale
    runs = [url(str(race)) for race in range(races)]
    for several in batched(range(races), AT_ONCE):
        old = [Ranks(1, suspended_save, env, runs[race], moments[race]) for race in several]
        for ranks in old:
            ranks.wait_until_stopped(0)
        before = [Run.open(runs[race]).log.entries() for race in several]
        run_ranks(1, save_next, env, *(runs[race] for race in several))
        for ranks in old:
            ranks.signal(0, signal.SIGCONT)
        for race, ranks, entries in zip(several, old, before, strict=True):
            (end,) = ranks.results()
            after = Run.open(runs[race]).log.entries()
            claim = next(e.n for e in after if e.kind == "CLAIM" and e.attempt == 2)
            assert all(e.attempt == 2 for e in after[claim - 1 :]), "the old attempt wrote behind the new one's claim"
            assert [e.n for e in entries] == list(range(1, claim))
            assert end == "stale" or any(e.kind == "COMMIT" and e.fields["step"] == 4 for e in entries)
            assert end == "stale" or moments[race] > 0
    (found,) = run_ranks(1, recover, env, *runs)
    assert len(found) == races
    for after in found:
        assert after["step"] == 11 and not after["problems"] and not after["passed_over"]


def save_next(env, *urls: str) -> None:
    for url in urls:
        with opened(env, url) as (world, run):
            save = saver(world, run)
            for step in (10, 11):
                assert save(step) is None
