"""The settings of sampling: every solver is in each table, and what a solver cannot do is one sentence."""

from typing import get_args

import pytest

from data_sharding.errors import UserError
from fitv2_scale.config.load import parse_config, with_changes
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.config.solvers import DDPM_LEVELS, SOLVERS, require_fitting

LEAST = {"model": {"depth": 2, "hidden": 32, "heads": 2}, "data": {"url": "x"}, "train": {"steps": 5}}
OF_FLOW, OF_DDPM = ["euler", "heun", "dopri5", "sde"], ["ddpm", "ddim"]


def test_every_solver_is_in_each_table():
    from fitv2_scale.evaluate.sampling.sampler import SOLVE
    from fitv2_scale.model.ddpm_schedule import LEVELS

    assert [solver.name for solver in SOLVERS] == list(SOLVE) == OF_FLOW + OF_DDPM
    assert sorted(get_args(SamplingConfig.model_fields["solver"].annotation)) == sorted(SOLVE)
    assert DDPM_LEVELS == LEVELS == 1000


def test_each_solver_is_for_one_objective():
    for objective, fitting in (("flow", OF_FLOW), ("ddpm", OF_DDPM)):
        for name in OF_FLOW + OF_DDPM:
            if name in fitting:
                require_fitting(name, objective)
            else:
                with pytest.raises(UserError, match=f"^sampling.solver is {name}, .*use {', '.join(fitting[:-1])} or "):
                    require_fitting(name, objective)


def test_pictures_during_training_are_of_a_solver_that_fits():
    def parse(solver: str, objective: str, every: int = 5):
        sampling = {"solver": solver, "every_steps": every}
        return parse_config(LEAST | {"objective": objective, "sampling": sampling}, "c.yaml")

    assert parse("ddim", "ddpm").sampling.solver == "ddim"
    assert parse("euler", "ddpm", every=0).sampling.solver == "euler"  # nothing is sampled
    with pytest.raises(UserError, match="^c.yaml: sampling.solver is euler, which is for .*ddpm or ddim"):
        parse("euler", "ddpm")


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"solver": "ddim", "steps": 300}, "steps is 300, and ddim takes equal strides .* give a divisor of 1000, as"),
        ({"solver": "ddim", "steps": 1}, "steps is 1, and ddim"),
        ({"solver": "ddim", "steps": 2000}, "steps is 2000, and ddim"),
        ({"solver": "ddpm", "steps": 1001}, "steps is 1001: give 2 to 1000 steps for solver=ddpm, as in 250"),
        ({"solver": "ddpm", "steps": 1}, "steps is 1: give 2 to 1000"),
        ({"guidance_interval": [0.5, 0.5]}, r"guidance_interval = .*: give \[t0, t1\] with 0 <= t0 < t1 <= 1, as in"),
        ({"guidance_interval": [-0.1, 0.5]}, r"give \[t0, t1\]"),
        ({"guidance_interval": [0.5, 1.1]}, r"give \[t0, t1\]"),
        ({"guidance_interval": [0.5]}, r"give \[t0, t1\]"),
    ],
)
def test_what_cannot_be_is_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        with_changes(SamplingConfig(), changes)


def test_what_can_be():
    for solver, steps in (("ddim", 2), ("ddim", 1000), ("ddpm", 2), ("ddpm", 1000), ("ddpm", 250), ("euler", 1)):
        assert with_changes(SamplingConfig(), {"solver": solver, "steps": steps}).steps == steps
    config = parse_config(LEAST, "c.yaml", ["sampling.guidance_interval=[0.2, 0.8]"])
    assert config.sampling.guidance_interval == [0.2, 0.8]
    assert parse_config(LEAST, "c.yaml").sampling.guidance_interval == [0, 1]
