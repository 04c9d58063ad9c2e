"""What a run has taken, over kills, layouts and forks: against the plan, and against an undisturbed run."""

import json
import time
from datetime import datetime
from pathlib import Path

import pytest

import fitv2_scale.train.loop as module
from fitv2_scale.data import Data
from fitv2_scale.model.counts import forward_flops
from fitv2_scale.run.run import Run
from fitv2_scale.tracking.journal import read
from fitv2_scale.train.loop import DONE, train
from fitv2_scale.train.metrics.accounting import Accounting, AttemptClock
from tests.support.paused_training import train_paused
from tests.support.ranks import Ranks, run_ranks
from tests.support.run_history import metrics, reach


def test_sums_over_the_run_survive_a_kill_and_another_layout(tiny):
    steps = 24
    changes = {"train__steps": steps, "checkpoint__every_steps": 5, "train__log_every": 2}
    undisturbed, disturbed = tiny("undisturbed", **changes), tiny("disturbed", **changes)
    assert run_ranks(1, train, undisturbed) == [DONE]
    ranks = Ranks(2, train_paused, disturbed, 15)
    reach(disturbed.run, 13, attempt=1)
    ranks.kill()
    assert run_ranks(3, train, disturbed) == [DONE] * 3
    whole, found = metrics(undisturbed.run), metrics(disturbed.run)
    assert list(found) == list(whole)
    plan, tokens, flops = Data.open(undisturbed, (1,)).plan, 0, 0
    for step in range(steps):
        lengths = plan.step(step).tokens.tolist()
        tokens += sum(lengths)
        flops += sum(3 * forward_flops(undisturbed.model, length) for length in lengths)
        if step + 1 in found:
            exact = {"images": 12 * (step + 1), "tokens": tokens, "flops": float(flops)}
            for at in (whole, found):
                assert {name: at[step + 1][name] for name in exact} == exact, step + 1
    hours = [m["gpu_hours"] for m in found.values()]
    assert all(a < b for a, b in zip(hours, hours[1:], strict=False)) and hours[0] > 0


def test_goodput_counts_what_is_kept(tiny):
    """Time before an attempt, between attempts, and of evaluation is no step; a killed attempt's is lost."""
    changes = {"train__steps": 8, "checkpoint__every_steps": 4}
    changes |= {"sampling__every_steps": 3, "sampling__sizes": ["32x48"], "sampling__steps": 2}
    began = time.time()
    assert run_ranks(1, train, tiny(**changes | {"train__steps": 4})) == [DONE]
    time.sleep(1)
    assert run_ranks(1, train, tiny(**changes)) == [DONE]
    took, run = time.time() - began, Run.open(tiny().run)
    found = metrics(run.url)
    ages = {r.step: r.time_ms / 1000 - datetime.fromisoformat(run.created).timestamp() for r in read(run) if r.metrics}
    age, last = ages[8], found[8]
    assert 0 < last["goodput"] < 1 - (1 + found[7]["evaluation_seconds"]) / age
    assert found[7]["goodput_evaluation"] > found[7]["evaluation_seconds"] / age  # that of the first attempt counts too
    assert 0 < last["gpu_hours"] * 3600 < took - 1
    assert last["goodput"] * age > 0.99 * found[4]["goodput"] * ages[4] > 0  # the first attempt's steps count
    assert [step for step, m in found.items() if "evaluation_seconds" in m] == [4, 7]


def test_a_fork_takes_over_what_its_weights_took_and_begins_its_own_time(tiny):
    assert run_ranks(1, train, tiny("parent", train__steps=5)) == [DONE]
    child = tiny("child", train__steps=7, optimizer__lr=5e-4)
    assert run_ranks(1, train, child, f"{tiny('parent').run}@5") == [DONE]
    parent, found = metrics(tiny("parent").run)[5], metrics(child.run)
    assert found[6]["tokens"] > parent["tokens"] > 0 and found[6]["gpu_hours"] > parent["gpu_hours"]
    kept = {"tokens": 7, "flops": 9, "device_seconds": 2.0, "step_seconds": 1.5, "evaluation_seconds": 0.5}
    assert Accounting.of(kept) == Accounting(7, 9, 2.0, 1.5, 0.5)  # of a version before compile_seconds
    kept["compile_seconds"] = 0.25
    assert Accounting.of(kept) == Accounting(7, 9, 2.0, 1.5, 0.5, 0.25)
    assert Accounting.of(kept, fork=True) == Accounting(7, 9, 2.0)
    assert Accounting.of({}) == Accounting()


def test_time_outside_steps_is_told_apart():
    clock = AttemptClock()
    with clock.outside_steps("evaluation"):
        time.sleep(0.02)
    before = clock.now()
    with pytest.raises(OSError), clock.outside_steps("checkpoint"):
        time.sleep(0.01)
        raise OSError
    took = clock.now().since(before)
    assert before.evaluation >= 0.02 and before.checkpoint == took.evaluation == 0
    assert 0.01 <= took.checkpoint < took.total and took.training == took.total - took.checkpoint


def test_the_first_step_of_each_shape_is_counted_apart():
    clock = AttemptClock()
    with clock.step((64, 5)):
        time.sleep(0.02)
        with clock.outside_steps("checkpoint"):
            time.sleep(0.03)
    first = clock.now()
    assert first.compile >= 0.02 and first.checkpoint >= 0.03
    assert first.compile + first.checkpoint <= first.total == first.training + first.checkpoint
    with clock.step((64, 5)):
        time.sleep(0.01)
    assert clock.now().compile == first.compile
    with clock.step((72, 5)):
        time.sleep(0.01)
    assert clock.now().compile >= first.compile + 0.01


def train_with_a_compiler(config, seconds: float) -> int:
    """Each first step on packs of a shape takes so much longer."""
    train_step, seen = module.train_step, set()

    def act(engine, batch, *rest):
        if batch.shape not in seen:
            seen.add(batch.shape)
            time.sleep(seconds)
        return train_step(engine, batch, *rest)

    module.train_step = act
    return train(config)


def test_compilation_is_no_goodput(tiny):
    config = tiny(train__steps=8)
    began = time.time()
    assert run_ranks(1, train_with_a_compiler, config, 1.5) == [DONE]
    took, found = time.time() - began, metrics(config.run)
    compiled = [m["compile_seconds"] for m in found.values() if "compile_seconds" in m]
    assert found[1]["compile_seconds"] >= 1.5 and 1 <= len(compiled) <= 3
    age = sum(compiled) / [m["goodput_compile"] for m in found.values() if "goodput_compile" in m][-1]
    assert found[8]["goodput"] < 1 - 1.5 * len(compiled) / took
    assert sum(compiled) < age < took


def test_a_run_from_the_future_has_no_goodput(tiny):
    """Its node's clock was wrong: the share of a negative time is none."""
    config = tiny(train__steps=2)
    assert run_ranks(1, train, config) == [DONE]
    path = Path(config.run, "run.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"created": "2999-01-01T00:00:00.000000+00:00"}))
    assert run_ranks(1, train, tiny(train__steps=4)) == [DONE]
    assert [("goodput" in m, "goodput_compile" in m) for m in metrics(config.run).values()][1::2] == [
        (True, False),
        (False, False),
    ]
    assert "no goodput" in Path(config.run, "attempts/2/logs/rank-00000.log").read_text()
