"""Killed at any moment, a run continues from its last commit and ends as if nothing had happened."""

import random
import time
from collections import Counter

import pytest

from data_sharding.errors import UserError
from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from fitv2_scale.train.loop import DONE, RETRY, train
from tests.oracle.training import Recipe
from tests.support.apart import assert_trained_as_apart, records_apart
from tests.support.commits import commit_bytes
from tests.support.layout_grid import FASTER
from tests.support.paused_training import train_paused
from tests.support.ranks import Ranks, run_ranks
from tests.support.run_history import last_step, losses, reach, trained
from tests.support.tiny_runs import IMAGES

EPOCH = IMAGES // 12  # steps


@pytest.mark.parametrize("size,seed,layout", [(1, 3, {}), (2, 1, {}), (3, 2, {}), (2, 4, FASTER)])
def test_a_run_killed_twice_ends_bit_equal(tiny, size, seed, layout):
    steps = 3 * EPOCH
    undisturbed = tiny("undisturbed", seed=seed, train__steps=steps, **layout)
    assert run_ranks(size, train, undisturbed) == [DONE] * size

    killed, rng = tiny("killed", seed=seed, train__steps=steps, **layout), random.Random(seed)
    first, second = sorted(rng.sample(range(2, steps - 1), 2))
    for attempt, step in enumerate((first, second), 1):
        ranks = Ranks(size, train_paused, killed, min(step + 5, steps - 1))  # or it could end before it is killed
        reach(killed.run, step, attempt)
        time.sleep(rng.uniform(0, 0.05))
        ranks.kill()
    assert run_ranks(size, train, killed) == [DONE] * size

    assert commit_bytes(killed.run) == commit_bytes(undisturbed.run)
    assert losses(killed.run) == losses(undisturbed.run)
    assert trained(killed.run) == trained(undisturbed.run)
    attempts = status(Run.open(killed.run))["attempts"]
    assert [a["code"] for a in attempts] == [None, None, DONE]
    assert trained(killed.run) == records_apart(killed, Recipe(seed), range(steps))
    # Every image exactly once an epoch, counted from what was trained on, for three epochs.
    seen = Counter((epoch, image) for images in trained(killed.run).values() for epoch, image, *_ in images)
    assert set(seen.values()) == {1}
    assert Counter(epoch for epoch, _ in seen) == {0: IMAGES, 1: IMAGES, 2: IMAGES}


def test_a_run_continues_with_other_ranks(tiny):
    """Four steps each on 1, 3 and 2 ranks and in a tensor group of DeepSpeed's, against a training written apart."""
    group = {"layout__tensor": 2, "layout__engine": "zero3"}
    for size, steps, layout in ((1, 4, {}), (3, 8, {}), (2, 12, {}), (2, 16, group)):
        moved = tiny("moved", seed=9, train__steps=steps, **layout)
        assert run_ranks(size, train, moved) == [DONE] * size
    assert_trained_as_apart(moved, Recipe(9))


def test_a_signal_saves_and_asks_for_another_attempt(tiny):
    config = tiny(train__steps=2000, checkpoint__every_steps=1000)
    ranks = Ranks(2, train, config)
    reach(config.run, 3, attempt=1)
    ranks.terminate(1)  # any rank: all agree
    assert ranks.results() == [RETRY, RETRY]
    report = status(Run.open(config.run))
    assert report["attempts"][0]["code"] == RETRY and report["attempts"][0]["why"].startswith("SIGTERM: saved at step")
    assert report["last_commit"]["step"] == last_step(config.run, 1) + 1


def test_a_finished_run_is_left_alone_and_can_be_extended(tiny):
    config = tiny(train__steps=5)
    assert run_ranks(1, train, config) == [DONE]
    assert run_ranks(1, train, config) == [DONE]
    assert len(status(Run.open(config.run))["attempts"]) == 1
    assert run_ranks(1, train, tiny(train__steps=7)) == [DONE]
    assert [e.fields["step"] for e in Run.open(config.run).log.commits()] == [5, 7]


def test_another_recipe_is_refused_with_the_difference(tiny):
    assert run_ranks(1, train, tiny(train__steps=2)) == [DONE]
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.001 -> 0\.002.*--fork-from"):
        run_ranks(1, train, tiny(optimizer__lr=2e-3))
    with pytest.raises(UserError, match=r"plan_hash|seed: 0 -> 1"):
        run_ranks(1, train, tiny(seed=1))
    # The runtime half is free: another capacity, another interval.
    assert run_ranks(2, train, tiny(train__steps=4, layout__max_tokens=64, checkpoint__every_steps=1)) == [DONE] * 2


def test_a_fork_begins_at_the_parents_commit(tiny):
    parent = tiny("parent", train__steps=10)
    assert run_ranks(1, train, parent) == [DONE]
    child = tiny("child", train__steps=12, optimizer__lr=5e-4)
    assert run_ranks(1, train, child, f"{parent.run}@5") == [DONE]
    run = Run.open(child.run)
    assert run.parent == {"run": Run.open(parent.run).id, "url": Run.open(parent.run).url, "step": 5}
    assert list(losses(child.run)) == list(range(6, 13))
    same = tiny("same", train__steps=10)
    assert run_ranks(1, train, same, f"{parent.run}@5") == [DONE]
    assert commit_bytes(same.run) == commit_bytes(parent.run)  # the same recipe, the same rest of the way
    with pytest.raises(UserError, match="choose one of them"):
        run_ranks(1, train, tiny("none"), f"{parent.run}@7")
