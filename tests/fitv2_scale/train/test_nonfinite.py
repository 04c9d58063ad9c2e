"""A loss or gradient that is not finite, anywhere, skips the step everywhere; too many in a row end the run."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fitv2_scale.train.loop as module
from fitv2_scale.evaluate.validation import Validation
from fitv2_scale.model.loss_groups import GROUPS
from fitv2_scale.model.objective import ImageLosses
from fitv2_scale.parallel.engine import StepResult
from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from fitv2_scale.tracking.journal import read
from fitv2_scale.train.loop import DONE, GIVE_UP, train
from tests.support.changed_losses import ChangedLosses
from tests.support.commits import all_commits
from tests.support.ranks import run_ranks

BAD = {2, 4, 5, 7}  # steps, counted from 0; commits come right after 2, 5 and 7
ENGINES = ["fsdp", "zero3"]


def train_with(config, change: Callable, *arguments) -> int:
    """Trains with ``change(train_step, *arguments)`` in place of train_step."""
    module.train_step = change(module.train_step, *arguments)
    return train(config)


def poisoned(train_step: Callable, how: str, rank: int, steps: set[int]) -> Callable:
    """What one rank computes in ``steps`` is not finite: through its data, its loss alone, or its gradient alone."""

    def change(losses: ImageLosses) -> ImageLosses:
        more = math.inf if how == "loss" else (losses.loss_I * 0).sqrt()  # whose derivative at 0 is infinite
        return replace(losses, loss_I=losses.loss_I + more)

    def step(engine, batch, objective, *rest):
        bad = dist.get_rank() == rank and batch.step in steps
        if bad and how == "data":
            batch.packs[-1].latents[0] = math.nan
        elif bad:
            objective = ChangedLosses(objective, change)
        return train_step(engine, batch, objective, *rest)

    return step


def left_out(train_step: Callable, steps: set[int]) -> Callable:
    """``steps`` are not done at all."""

    def step(engine, batch, *rest):
        nan, one = torch.full((2, len(GROUPS)), math.nan), torch.tensor(1.0)
        return (nan, StepResult(nan[0, 0], one)) if batch.step in steps else train_step(engine, batch, *rest)

    return step


CASES = [  # what is not finite, ranks, layout, train.log_every
    ("data", 2, {}, 1),
    ("loss", 3, {}, 4),
    ("gradient", 2, {"max_tokens": 64}, 3),  # several packs: the bad one is accumulated with good ones
    ("loss", 2, {"replicate": 2}, 1),  # no shard group has both ranks
    ("data", 4, {"tensor": 2}, 3),
]


@pytest.mark.parametrize(
    "engine,how,size,layout,log_every",
    [(engine, *case) for engine in ENGINES for case in CASES if (engine, case[2]) != ("zero3", {"replicate": 2})],
)
def test_bad_steps_are_as_if_left_out(tiny, engine, how, size, layout, log_every):
    changes = {f"layout__{key}": value for key, value in layout.items()} | {"layout__engine": engine}
    changes |= {"train__steps": 8, "train__max_skipped": 3, "train__log_every": log_every}
    changes |= {"checkpoint__every_steps": 3, "checkpoint__keep_last": 9}
    bad, without = tiny("bad", **changes), tiny("without", **changes)
    assert run_ranks(size, train_with, bad, poisoned, how, size - 1, BAD) == [DONE] * size
    assert run_ranks(size, train_with, without, left_out, BAD) == [DONE] * size

    assert all_commits(bad.run) == all_commits(without.run)
    found, expected = ([r for r in read(Run.open(run)) if r.metrics] for run in (bad.run, without.run))
    assert [r.step for r in found] == sorted({*range(log_every, 9, log_every), 3, 6, 8})
    assert sum(r.metrics["skipped_steps"] for r in found) == len(BAD)
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("loss", "loss_min", "loss_max", "grad_norm"):  # of the good steps alone
            assert ours.metrics[key] == pytest.approx(theirs.metrics[key], rel=1e-12, nan_ok=True)
        if math.isfinite(ours.metrics["loss"]):  # no image is longer than 64 tokens
            assert ours.metrics["loss_tokens_le64"] == pytest.approx(ours.metrics["loss"], rel=1e-6)
    assert any(math.isfinite(r.metrics["loss"]) for r in found)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("log_every", [1, 5])
def test_too_many_in_a_row_end_the_run(tiny, engine, log_every):
    """Known one step late, so a step more is taken; but the last commit is one that was examined before."""
    changes = {"train__steps": 20, "train__max_skipped": 3, "train__log_every": log_every, "layout__engine": engine}
    changes |= {"checkpoint__keep_last": 9}
    between = tiny("between", checkpoint__every_steps=2, **changes)
    assert run_ranks(2, train_with, between, poisoned, "data", 1, {3, 5, 6, 7, 8}) == [GIVE_UP] * 2
    assert why(between) == "loss or gradient was not finite in 3 steps in a row, the last is step 8"
    assert [e.fields["step"] for e in Run.open(between.run).log.commits()] == [2, 4, 6]
    assert last_taken(between) == 7  # the 8th: a commit was due, so it was examined at once

    before = tiny("before", checkpoint__every_steps=50, **changes)
    assert run_ranks(2, train_with, before, poisoned, "data", 0, set(range(4, 20))) == [GIVE_UP] * 2
    assert why(before).endswith("3 steps in a row, the last is step 7")
    assert Run.open(before.run).log.commits() == []
    assert last_taken(before) == 7  # the 8th, while the 7th was on its way


def why(config) -> str:
    (attempt,) = status(Run.open(config.run))["attempts"]
    return attempt["why"]


def last_taken(config) -> int:
    lines = Path(config.run, "attempts/1/audit/rank-00000.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["step"]


def test_a_run_whose_last_steps_have_no_loss_is_no_success(tiny):
    """The learning rate ruins the weights within 20 steps, too few for train.max_skipped."""
    changes = {"optimizer__lr": 1e30, "optimizer__warmup_steps": 0, "checkpoint__every_steps": 10}
    config = tiny(train__steps=20, **changes)
    for attempt in (1, 2):  # again from the last commit: still none
        assert run_ranks(2, train, config) == [GIVE_UP] * 2
        assert Run.open(config.run).log.commits()[-1].fields["step"] == 10
        reason = status(Run.open(config.run))["attempts"][attempt - 1]["why"]
        assert re.match(r"loss or gradient was not finite in the last \d+ steps: these weights have no loss", reason)


def train_with_validation_losses(config, losses: dict[int, float]) -> int:
    """``losses`` by the number of the call, from 0; raw and EMA weights in turn."""
    calls = iter(range(99))
    Validation.loss = lambda self, network, between: losses.get(next(calls), 1.0)
    return train(config)


@pytest.mark.parametrize("bad,code", [({0: math.nan}, DONE), ({2: math.nan}, GIVE_UP), ({3: math.inf}, GIVE_UP)])
def test_the_last_validation_must_be_finite(tiny, dataset, bad, code):
    config = tiny(train__steps=4, validation__every_steps=2, validation__url=dataset, checkpoint__every_steps=3)
    assert run_ranks(2, train_with_validation_losses, config, bad) == [code] * 2
    assert Run.open(config.run).log.commits()[-1].fields["step"] == (4 if code == DONE else 3)
    expected = "all 4 steps are done" if code == DONE else "loss or gradient was not finite: the validation loss"
    assert why(config).startswith(expected)
