"""A run that has done all its steps is given to `fitv2 train` again."""

import shutil
from pathlib import Path

import pytest

from data_sharding.errors import UserError
from fitv2_scale.run.run import BAD_INPUT, DONE, Run
from fitv2_scale.train.loop import train
from tests.support.other_weights import replace_weights, weights_of
from tests.support.ranks import run_ranks

GONE = "/no/such/set"


def ended(config, fork_from: str | None = None) -> tuple[int, str]:
    try:
        return train(config, fork_from), ""
    except UserError as error:
        return BAD_INPUT, str(error)


@pytest.fixture
def finished(tiny, two_step_run, tmp_path):
    """A config of that run, with changes. It has no data any more, which only a run that has steps to do needs."""
    shutil.copytree(two_step_run, tmp_path / "run")
    return lambda **changes: tiny(**{"train__steps": 2, "ema__decay": 0.1, "data__url": GONE} | changes)


def test_it_is_done_with_its_recipe_whatever_else_is_asked(finished):
    for runtime in ({}, {"layout__max_tokens": 1024}, {"batch__images": 6}, {"train__steps": 1}):
        assert run_ranks(2, ended, finished(**runtime)) == [(DONE, "")] * 2
    assert [entry.kind for entry in Run.open(finished().run).log.entries()] == ["CLAIM", "COMMIT"]


@pytest.mark.parametrize(
    "changes,difference",
    [
        ({"optimizer__lr": 0.5}, "optimizer.lr: 0.001 -> 0.5"),
        ({"seed": 7}, "seed: 0 -> 7"),
        ({"init_from": f"{GONE}.safetensors"}, f'init_from: "" -> "{GONE}.safetensors"'),
    ],
)
def test_another_recipe_is_refused_and_the_difference_shown(finished, changes, difference):
    config = finished(**changes)
    sentence = (
        f"{config.run} holds a different run ({difference}); give a new run folder, or fork it with --fork-from "
        "RUN@STEP."
    )
    assert run_ranks(2, ended, config) == [(BAD_INPUT, sentence)] * 2


def test_another_parent_is_refused(finished, two_step_run):
    ((code, said),) = run_ranks(1, ended, finished(), f"{two_step_run}@2")
    assert code == BAD_INPUT and 'different run (parent: null -> {"run": "run-' in said


def test_the_weights_that_it_began_with_may_be_gone_but_not_be_others(tiny, two_step_run, tmp_path):
    file, _ = weights_of(two_step_run, tmp_path / "first")
    config = tiny(init_from=file, train__steps=2)
    assert run_ranks(1, train, config) == [DONE]
    moved = str(tmp_path / "moved.safetensors")
    shutil.copy(file, moved)
    elsewhere = tiny(init_from=moved, train__steps=2)
    assert run_ranks(1, ended, elsewhere) == [(DONE, "")]
    replace_weights(moved)
    ((code, said),) = run_ranks(1, ended, elsewhere)
    assert code == BAD_INPUT and f'(init_from: "{file}" -> "{moved}")' in said
    for gone in (file, moved):
        Path(gone).unlink()
    assert run_ranks(1, ended, config) == run_ranks(1, ended, elsewhere) == [(DONE, "")]
