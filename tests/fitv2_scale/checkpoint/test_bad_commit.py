"""A commit that cannot be read where it lies, though all else can, is damaged. In an outage none is."""

import errno
from pathlib import Path

import pytest

from data_sharding.errors import StorageDown
from data_sharding.storage import bad_places
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.retry import RetryPolicy
from fitv2_scale.checkpoint import bad_commit
from fitv2_scale.checkpoint.commit import verify_commit, verify_together
from fitv2_scale.checkpoint.restore import restore
from fitv2_scale.run.quarantine import quarantined
from tests.support.checkpoint_state import State, opened, saver
from tests.support.faulty_disk import FaultyDisk
from tests.support.ranks import run_ranks

STEPS = (2, 10, 11)
OLDEST, NEWEST, NEWEST_TWO = "steps/00000002", "steps/00000011", "steps/0000001"


def save_all(url: str) -> list[str | None]:
    with opened({}, url) as (world, run):
        save = saver(world, run, keep_last=3)
        return [save(step) for step in STEPS]


def disk() -> FaultyDisk:
    """Of this rank, for stores that are opened later: they wait only a moment."""
    LocalStore.__init__.__defaults__ = (RetryPolicy(deadline=0.01),)
    bad_places._SECONDS = 0.01
    return FaultyDisk(pytest.MonkeyPatch())


def restored(url: str, ranks: tuple[int, ...], number: int, part: str, point: str) -> tuple:
    """Which step is restored (a sentence: it is not), if the disk of these ranks fails; and what that leaves behind."""
    faulty = disk()
    with opened({}, url) as (world, run):
        state = State(-1, world)
        if world.rank in ranks:
            faulty.fail(number, part, point)
        try:
            found = restore(state, run, world)
            problem = " ".join(found.quarantined)
            assert state.is_whole(found.step)
        except StorageDown as error:
            found, problem = None, str(error)
        faulty.points = ()
        assert [entry.fields["step"] for entry in run.log.commits()] == list(STEPS)  # nothing was retired
        steps = {entry.n: entry.fields["step"] for entry in run.log.commits()}
        return found and found.step, {steps[n] for n in quarantined(run)}, problem


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    url = str(tmp_path_factory.mktemp("bad") / "run")
    assert run_ranks(2, save_all, url) == [[None] * 3] * 2
    return url


@pytest.fixture
def run(saved) -> str:
    for record in Path(saved, "quarantine").glob("*"):
        record.unlink()
    return saved


@pytest.mark.parametrize("name", ["EIO", "EUCLEAN"])
@pytest.mark.parametrize(
    ("part", "step", "passed_over"),
    [
        (f"{NEWEST}.0001/rank-00001", 10, {11}),
        (f"{NEWEST}.0001/manifest", 10, {11}),
        (NEWEST_TWO, 2, {10, 11}),
    ],
)
def test_a_commit_in_a_bad_place_is_passed_over(run, name, part, step, passed_over):
    number = getattr(errno, name)
    for point in ("open", "read"):
        ((found, bad, problem),) = run_ranks(1, restored, run, (0,), number, part, point)
        assert (found, bad) == (step, passed_over)
        assert "the commit at step 11 is damaged" in problem and "other commits can be read" in problem


def test_the_disk_of_one_rank_decides_for_all(run):
    found = run_ranks(2, restored, run, (1,), errno.EIO, f"{NEWEST}.0001/rank-00001", "read")
    assert [(step, bad) for step, bad, _ in found] == [(10, {11})] * 2


@pytest.mark.parametrize(
    ("name", "part"), [("EIO", "steps/"), ("EIO", "run/"), ("ESHUTDOWN", NEWEST), ("EIO", "rank-00001")]
)
def test_in_an_outage_no_commit_is_damaged(run, name, part):
    """One of all, one of a part of the disks, in which other files can be read; and of one that says nothing of a
    place."""
    ((found, bad, problem),) = run_ranks(1, restored, run, (0,), getattr(errno, name), part, "read")
    assert (found, bad) == (None, set()) and "cannot be reached" in problem


def test_the_only_commit_is_not_given_up(tmp_path):
    url = str(tmp_path / "run")
    assert run_ranks(1, save_one, url) == [None]
    ((found, problem),) = run_ranks(1, restore_the_only_one, url)
    assert found is None and "cannot be reached" in problem


def save_one(url: str) -> str | None:
    with opened({}, url) as (world, run):
        return saver(world, run)(2)


def restore_the_only_one(url: str) -> tuple:
    faulty = disk()
    with opened({}, url) as (world, run):
        faulty.fail(errno.EIO, OLDEST, "read")
        with pytest.raises(StorageDown) as down:
            restore(State(-1, world), run, world)
        return (None if not run.store.list("quarantine/") else "quarantine"), str(down.value)


def restore_when_an_outage_ends(url: str) -> tuple:
    """It does while other commits are asked."""
    faulty, ask = disk(), bad_commit._another_can_be_read

    def and_the_outage_is_over(*asked) -> bool:
        faulty.points = ()
        return ask(*asked)

    bad_commit._another_can_be_read = and_the_outage_is_over
    with opened({}, url) as (world, run):
        state = State(-1, world)
        faulty.fail(errno.EIO, "steps/", "read")
        return restore(state, run, world).step, state.is_whole(11), quarantined(run)


def test_an_outage_that_ends_while_others_are_asked_damages_nothing(run):
    assert run_ranks(1, restore_when_an_outage_ends, run) == [(11, True, set())]


def look(url: str, number: int, part: str) -> list:
    """What is wrong with each commit; what a save leaves that keeps two."""
    faulty = disk()
    with opened({}, url) as (world, run):
        faulty.fail(number, part, "read", "stat")
        problems = [len(verify_commit(run, entry)) for entry in run.log.commits()]
        assert [len(verify_together(run, entry, world)) for entry in run.log.commits()] == problems
        assert saver(world, run, keep_last=2)(20) is None
        return [problems, [entry.fields["step"] for entry in run.log.commits()]]


@pytest.mark.parametrize(
    ("part", "left"),
    [("nothing", [11, 20]), (f"{NEWEST}.0001/", [10, 11, 20])],
)
def test_a_commit_in_a_bad_place_is_none_of_those_to_keep(tmp_path, part, left):
    url = str(tmp_path / "run")
    assert run_ranks(1, save_all, url) == [[None] * 3]
    ((problems, steps),) = run_ranks(1, look, url, errno.EIO, part)
    assert problems == [0, 0, int(part != "nothing")] and steps == left
