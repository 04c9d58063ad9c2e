"""What ranks compare before each step, in one sum: packs, tokens, ids. Ranks are threads here."""

import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from data_sharding.errors import StorageDown, UserError
from data_sharding.plan.pack_layout import PackShape, lay_out
from data_sharding.stream.batch import Pack, StepBatch
from fitv2_scale.parallel.failures import BrokenOff
from fitv2_scale.train.coordination import Coordination
from tests.support.thread_ranks import outcomes

SHAPE = PackShape(tokens=32, images=6, max_seqlen=16)
LENGTHS = {0: (16, 4), 1: (9, 6), 2: (12, 8)}  # tokens of each rank's images; its ids are 10 r and 10 r + 1


def pack(lengths: tuple[int, ...]) -> Pack:
    layout = lay_out([(1, tokens) for tokens in lengths], SHAPE)
    zeros = np.zeros(SHAPE.images, np.int64)
    return Pack(layout, np.zeros((SHAPE.tokens, 16), np.float16), zeros, np.zeros(SHAPE.images), zeros, zeros)


def planned(rank: int, size: int) -> StepBatch:
    """The part of ``rank`` in a step that nothing is wrong with."""
    ids = [10 * r + i for r in range(size) for i in range(2)]
    lengths = np.array([tokens for r in range(size) for tokens in LENGTHS[r]])
    return StepBatch(7, [pack(LENGTHS[rank])], 20 * rank + 1, sum(ids), lengths, size * SHAPE.tokens, 1, 1.0, 0)


class Loader:
    def __init__(self, batch: StepBatch | Exception):
        self._batch = batch

    def is_ready(self, seconds: float) -> bool:
        return True

    def __next__(self) -> StepBatch:
        if isinstance(self._batch, Exception):
            raise self._batch
        return self._batch


def taken(size: int, changed: Callable[[int, StepBatch], StepBatch | Exception], reads=lambda rank: True) -> list:
    """What ``next_batch`` raises on each rank, or why it asks to stop, else how many collectives it took."""

    def act(world):
        batch = planned(world.rank, size)
        relay = SimpleNamespace(broadcast=lambda mine: mine or batch)
        stop, checkpoints = SimpleNamespace(name=None), SimpleNamespace(save_ended=False, newest=0)
        coordination = Coordination(world, relay, stop, None, checkpoints, None)
        loader = Loader(changed(world.rank, batch)) if reads(world.rank) else None
        found = coordination.next_batch(7, loader)
        return (coordination.bad_input or coordination.stop_reason) if found is None else coordination._apart.exchanges

    return outcomes(size, act)


def test_a_step_as_planned_takes_one_exchange():
    assert taken(1, lambda rank, batch: batch) == [1]
    assert taken(3, lambda rank, batch: batch) == [1, 1, 1]
    # Of a tensor group, one rank reads.
    assert taken(2, lambda rank, batch: replace(batch, step_id_sum=1, step_lengths=np.array([16, 4])), lambda r: r == 0)


def assert_all_raise(found: list, sentence: str) -> None:
    assert [type(error) for error in found] == [RuntimeError] * len(found), found
    for error in found:
        assert sentence in str(error)


@pytest.mark.parametrize("packs", [(1, 2), (1, 2, 3), (2, 1, 1), (1, 1, 2)])
def test_other_numbers_of_packs(packs):
    """The ranks with fewer would wait in another collective; also where one has just the mean."""
    found = taken(len(packs), lambda rank, batch: replace(batch, packs=batch.packs * packs[rank]))
    assert_all_raise(found, "step 7: the ranks are not about to take the same step: packs is ")
    assert f"{packs[0]} on rank" in str(found[0])


@pytest.mark.parametrize(
    "change,name",
    [
        ({"step": 8}, "step is 7 on ranks 0-1 (n0) and 8 on rank 2 (n1)"),
        ({"step_capacity": 99}, "capacity of all packs is 96"),
        ({"step_id_sum": 5}, "sum of hashed ids is 63"),
        ({"step_substituted": 1}, "substituted images is 0"),
        ({"step_lengths": np.array([16, 4, 9, 6, 12, 7])}, "tokens is 55 on ranks 0-1 (n0) and 54"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_another_step(change, name):
    assert_all_raise(taken(3, lambda rank, batch: replace(batch, **change) if rank == 2 else batch), name)


def test_images_that_are_not_those_of_the_plan():
    found = taken(2, lambda rank, batch: replace(batch, id_sum=batch.id_sum + rank))
    assert_all_raise(found, "step 7: the ranks' images are not the planned ones")
    found = taken(2, lambda rank, batch: replace(batch, packs=[pack((9, 5))]) if rank else batch)
    assert_all_raise(found, "step 7: the ranks' images have 34 tokens instead of 35 as planned")


def test_a_substitute_may_be_shorter_and_not_longer():
    def substituted(length: int):
        def change(rank: int, batch: StepBatch) -> StepBatch:
            packs = [pack((9, length))] if rank else batch.packs
            return replace(batch, packs=packs, step_substituted=1)

        return change

    assert taken(2, substituted(5)) == [1, 1]
    assert_all_raise(taken(2, substituted(7)), "36 tokens instead of 35")


def test_what_one_rank_meets_all_raise_and_it_keeps_its_own():
    """So that the traceback stays where it belongs. Storage that does not answer, and data that cannot be used, are
    reasons to stop."""
    bug = ZeroDivisionError("in the loader")
    own, other = taken(2, lambda rank, batch: batch if rank else bug)
    assert own is bug and type(other) is ZeroDivisionError and other.__notes__ == ["(rank 0 on n0 raised this)"]
    wrong = UserError("damaged")
    other, own = taken(2, lambda rank, batch: wrong if rank else batch)
    assert own is wrong and other.said_by(0) == "rank 1 on n0: damaged"
    down = taken(2, lambda rank, batch: StorageDown("no answer") if rank else batch)
    assert down == ["rank 1 on n0: no answer", "no answer"]
    both = {0: StorageDown("no answer"), 1: wrong}
    assert [str(error) for error in taken(2, lambda rank, batch: both[rank])] == ["damaged", "damaged"]


class Steps:
    """A loader whose batch is there once its ``ready`` is set."""

    def __init__(self, batches: list[StepBatch]):
        self._batches, self.ready = iter(batches), threading.Event()

    def is_ready(self, seconds: float) -> bool:
        return self.ready.wait(seconds)

    def __next__(self) -> StepBatch:
        return next(self._batches)


def coordinated(world, stop=None) -> Coordination:
    relay = SimpleNamespace(broadcast=lambda mine: mine)
    checkpoints = SimpleNamespace(save_ended=False, newest=0)
    return Coordination(world, relay, stop or SimpleNamespace(name=None), None, checkpoints, None)


def test_a_step_is_agreed_on_while_the_one_before_is_computed():
    """The sum of step 8 is there before a rank asks for the step; who has no data yet tells no less, later."""

    def act(world) -> tuple[bool, bool, list[int], int]:
        batches = [planned(world.rank, world.size)]
        batches.append(replace(batches[0], step=8))
        coordination, loader = coordinated(world), Steps(batches)
        loader.ready.set()
        taken = [coordination.next_batch(7, loader).step]
        if world.rank == 2:
            loader.ready.clear()
        coordination.look_ahead(loader)
        begun = coordination._begun is not None
        if world.rank == 2:
            world.all_gather(None)  # the others have begun by then, and wait
            loader.ready.set()
        else:
            assert not coordination._begun.sums.done()
            world.all_gather(None)
            coordination._begun.sums.result(60)
        taken.append(coordination.next_batch(8, loader).step)
        with coordination.ending():
            pass
        return begun, coordination._expected, taken, coordination._apart.exchanges

    assert outcomes(3, act) == [(True, False, [7, 8], 2)] * 2 + [(False, False, [7, 8], 2)]


def test_a_step_that_some_have_begun_and_none_takes_is_ended():
    """As after too many steps that were not finite: all leave, and none waits for the others."""

    def act(world) -> int:
        coordination, loader = coordinated(world), Steps([planned(world.rank, world.size)] * 2)
        loader.ready.set()
        coordination.next_batch(7, loader)
        with coordination.ending():
            if world.rank:
                loader.ready.clear()
            coordination.look_ahead(loader)
        return coordination._apart.exchanges

    assert outcomes(3, act) == [2, 2, 2]


def test_no_step_is_begun_after_a_stop():
    def act(world) -> tuple[int, bool, str]:
        stop = SimpleNamespace(name="SIGTERM" if world.rank else None)
        coordination, loader = coordinated(world, stop), Steps([planned(world.rank, world.size)] * 2)
        loader.ready.set()
        with coordination.ending():
            assert coordination.next_batch(7, loader).step == 7  # it is taken, and saved
            coordination.look_ahead(loader)
        return coordination._apart.exchanges, coordination._expected, coordination.stop_reason

    assert outcomes(2, act) == [(1, False, "SIGTERM")] * 2


def test_what_is_asked_for_meanwhile_counts_for_the_step_after():
    """A signal, and a save, that come when a step has been begun: told once, with the next."""

    def act(world) -> tuple[list[bool], list[str | None]]:
        stop, requests = SimpleNamespace(name=None), SimpleNamespace(stop=False, saves=0)
        coordination, loader = coordinated(world, stop), Steps([planned(world.rank, world.size)] * 4)
        coordination._requests = requests if world.is_first else None
        loader.ready.set()
        saves, stops = [], []
        for _ in range(4):
            coordination.next_batch(7, loader)
            saves.append(coordination.should_save)
            stops.append(coordination.stop_reason)
            coordination.look_ahead(loader)
            if len(saves) == 1:
                requests.saves = 1
            if len(saves) == 2 and world.rank == 1:
                stop.name = "SIGUSR1"
        with coordination.ending():
            pass
        return saves, stops

    assert outcomes(2, act) == [([False, False, True, False], [None, None, None, "SIGUSR1"])] * 2


def test_a_save_counts_as_ended_when_all_tell_so_of_the_one_in_flight():
    """Rank 0 begins step 8 while it knows of the save before alone; what it tells then is not of the new one."""

    def act(world) -> list[bool]:
        coordination, loader = coordinated(world), Steps([planned(world.rank, world.size)] * 5)
        checkpoints, seen = coordination._checkpoints, []
        for newest, at_once, ended in [(3, True, True), (6, False, True), (6, True, False), (6, True, True)]:
            loader.ready.set()
            if not at_once and world.rank == 1:
                loader.ready.clear()
            coordination.look_ahead(loader)
            checkpoints.newest, checkpoints.save_ended = newest, ended or world.rank == 0
            loader.ready.set()
            coordination.next_batch(7, loader)
            seen.append(coordination.save_ended)
        coordination.next_batch(7, loader)
        return [*seen, coordination.save_ended]

    # Nothing was in flight; rank 0 told of 3, rank 1 of 6; both of 6; not rank 1; both again.
    assert outcomes(2, act) == [[False, False, True, False, True]] * 2


def test_work_between_two_steps_is_broken_off_on_all_ranks_when_one_is_to_stop():
    """The reason is that of the rank that knows it, and costs nothing to ask for again."""

    def act(world) -> tuple[str | None, str, int]:
        stop, checkpoints = SimpleNamespace(name=None), SimpleNamespace(save_ended=False, newest=0)
        coordination = Coordination(world, None, stop, None, checkpoints, None)
        coordination.break_off_if_stopped()
        before, stop.name = coordination.stop_reason, "SIGUSR1" if world.rank == 1 else None
        for _ in range(2):
            with pytest.raises(BrokenOff, match="SIGUSR1"):
                coordination.break_off_if_stopped()
        return before, coordination.stop_reason, world.exchanges

    assert outcomes(3, act) == [(None, "SIGUSR1", 3)] * 3
