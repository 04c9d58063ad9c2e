"""A rank that fails anywhere ends all others with its sentence, printed where it arose."""

import os
import pickle

import pytest
import torch
import torch.distributed as dist

from data_sharding.errors import StorageDown, UserError
from fitv2_scale.parallel.failures import LastWords, RankLost, leave
from fitv2_scale.parallel.world import World, join
from tests.support.ranks import run_ranks


def fail(world: World, error: Exception, rank: int, together: bool) -> None:
    """``rank`` raises; the others are in a collective, or do the same."""
    if world.rank == rank or together:
        raise error
    world.all_reduce_sum(torch.ones(1))


def outcome(error: Exception, rank: int, together: bool) -> tuple[str, str, str | None]:
    """Type and text of what this rank raises, and what it prints."""
    try:
        with join() as world:
            world.all_gather(None)  # connected, as in the middle of a run
            fail(world, error, rank, together)
    except Exception as raised:
        said = raised.said_by(int(os.environ["RANK"])) if isinstance(raised, UserError) else None
        return type(raised).__name__, str(raised), said
    raise AssertionError("it ended well")


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("error", [UserError("no such file"), StorageDown("no answer")], ids=repr)
def test_the_others_say_why(rank, error):
    found = run_ranks(3, outcome, error, rank, False)
    assert {(kind, text) for kind, text, _ in found} == {(type(error).__name__, str(error))}
    printed = [said for _, _, said in found]
    assert printed[rank] == str(error)
    if rank:
        assert printed[0].startswith(f"rank {rank} on ") and printed[0].endswith(f": {error}")
    assert [said for r, said in enumerate(printed) if r not in (0, rank)].count(None) == (1 if rank else 2)


def test_a_bug_is_told_too():
    found = run_ranks(2, outcome, ZeroDivisionError("by zero"), 1, False)
    assert found == [("ZeroDivisionError", "by zero", None)] * 2


def test_of_all_ranks_with_one_sentence_one_prints_it():
    """Whichever is first; and rank 0 may repeat it."""
    found = run_ranks(4, outcome, UserError("no such file"), 0, True)
    printed = [said for _, _, said in found if said is not None]
    assert printed.count("no such file") == 1 and len(printed) <= 2
    assert {text for _, text, _ in found} == {"no such file"}


def first_alone(error: Exception) -> tuple[bool, str | None]:
    """What a rank raises and prints of what only the first one does."""
    with join() as world:

        def act():
            raise error

        try:
            world.run_on_rank0(act)
        except UserError as raised:
            return raised is error, raised.said_by(world.rank)
    raise AssertionError("it ended well")


def test_what_the_first_rank_does_alone_is_said_by_it():
    found = run_ranks(2, first_alone, UserError("no such file"))
    assert found == [(True, "no such file"), (False, None)]


class Questions(dist.HashStore):
    """A store that counts how often it is asked who has left."""

    asked = 0

    def add(self, key: str, amount: int) -> int:
        self.asked += amount == 0
        return super().add(key, amount)


def test_the_first_rank_stays_for_those_that_can_come_not_for_the_lost():
    """It holds the store: rank 2 of three may still read the words in it, rank 1 has been killed."""
    store = Questions()
    words = LastWords(store, 0, 3, "node1", lambda error: error)
    lost = pickle.loads(pickle.dumps(RankLost("rank 1 on node2 ended", [1])))
    assert words.settle(lost) is lost
    leave(store, 2, 3)
    words.leave()
    assert store.asked == 1


def test_a_store_that_has_gone_with_the_first_rank_is_not_asked(monkeypatch):
    """Torch would print stacks on the terminal."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    words = LastWords(None, 1, 3, "node1", lambda error: error)  # anything that is done with it would fail
    lost = RankLost("rank 0 on node1 ended", [0])
    assert words.settle(lost) is lost
    words.leave()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # torchrun's outlives the rank
    first, second = (LastWords(dist.HashStore(), rank, 3, "node1", lambda error: error) for rank in (1, 2))
    assert first.settle(lost) is lost and second.settle(lost) is lost


def test_a_bug_that_was_told_wins_over_the_loss_of_its_rank():
    """Whose process has ended by the time that the others look. A lost rank is named alike, whoever found it."""
    store = dist.HashStore()
    first, second = (LastWords(store, rank, 3, "node1", lambda error: error) for rank in (1, 2))
    first.settle(ZeroDivisionError("by zero"))
    assert isinstance(second.settle(RankLost("rank 1 on node1 ended", [1])), ZeroDivisionError)
    store = dist.HashStore()
    first, second = (LastWords(store, rank, 3, "node1", lambda error: error) for rank in (2, 0))
    first.settle(RankLost("rank 1 on node1 ended", [1]))
    told = second.settle(RuntimeError("gloo"))
    assert told.origin == "rank 2 on node1" and told.ranks == (1,)
    assert [told.said_by(rank) for rank in (0, 1)] == ["rank 1 on node1 ended", None]
    assert told.said_by(1, for_node=True) == "rank 1 on node1 ended"
