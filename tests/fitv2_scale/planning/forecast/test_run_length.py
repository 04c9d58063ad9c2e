"""The save schedules of a run and what it is told of them. What a schedule costs is in test_goodput."""

import pytest

from fitv2_scale.config.sections import CheckpointConfig
from fitv2_scale.planning.forecast.assumptions import Assumptions
from fitv2_scale.planning.forecast.goodput import Schedule, expected_goodput
from fitv2_scale.planning.forecast.run_length import (
    RELEASED_SAVE,
    RELEASED_STEPS,
    configured_commits,
    configured_schedule,
    goodput_report,
    recommended_schedule,
    released_schedule,
)
from fitv2_scale.planning.forecast.save_interval import recommended_interval
from tests.support.save_costs import lost_share


def test_schedules_of_a_config_in_seconds(tiny):
    config, assumed = tiny(slurm__walltime="1:00:00"), Assumptions()
    assert configured_schedule(config, 0.5, assumed).interval == 2.5  # every 5 steps
    by_time = config.model_copy(update={"checkpoint": CheckpointConfig(every_minutes=10)})
    assert configured_schedule(by_time, 0.5, assumed).interval == 600
    released = released_schedule(config, 0.5)
    assert released.interval == RELEASED_STEPS * 0.5 and released.stall == released.durable == RELEASED_SAVE


def test_commits_of_a_config(tiny):
    def commits(seconds_a_step: float = 0.5, **checkpoint) -> int:
        config = tiny(train__steps=24).model_copy(update={"checkpoint": CheckpointConfig(**checkpoint)})
        return configured_commits(config, seconds_a_step)

    assert commits(every_steps=5) == 5  # 5, 10, 15, 20 and the last one
    assert commits(every_steps=4) == commits(every_steps=4, keep_every=8) == 6
    assert commits(every_steps=100) == commits(every_minutes=30) == 1  # at the end
    assert commits(every_steps=10, milestones=[7, 20, 99]) == 4  # 7, 10, 20, 24
    assert commits(every_minutes=1, seconds_a_step=5.1) == 3  # 122 seconds
    assert commits(every_minutes=1, seconds_a_step=5.1, milestones=[7, 24]) == 4


def test_the_report_says_one_interval_in_three_units(tiny):
    report = goodput_report(tiny(), 0.5, 2, Assumptions(), {})
    seconds = report["interval_seconds"]
    assert seconds == recommended_schedule(tiny(), 0.5, 2, Assumptions()).interval
    assert report["interval_minutes"] * 60 == pytest.approx(seconds) and report["interval_steps"] == round(seconds * 2)


def test_numbers_of_nodes_are_compared_each_with_its_own_failures_and_steps(tiny):
    """Failures are noticed at once and saves block, as Daly has it; the released script's by the formula of goodput."""
    given = {"stall_seconds": 3, "durable_seconds": 3, "detect_seconds": 0, "restart_seconds": 100}
    assumed = Assumptions().with_given(failures_per_node_day=0.5, **given)
    config = tiny(slurm__walltime="10-00:00:00", train__steps=10_000_000)
    rows = goodput_report(config, 0.5, 2, assumed, {4: 0.4, 16: 0.1})["beside_released"]
    assert [(row["nodes"], row["seconds_a_step"]) for row in rows] == [(4, 0.4), (16, 0.1)]
    for row, mtbf in zip(rows, (12, 3), strict=True):  # hours
        interval = recommended_interval(3, mtbf)
        work = 10_000_000 * row["seconds_a_step"]
        seconds = work / (1 - lost_share(interval, 3, mtbf, 100))
        jobs = -(-seconds // (864_000 - 103))
        assert row["ours"] == pytest.approx(work / (seconds + jobs * 103), abs=1e-6)
        released = Schedule(4000 * row["seconds_a_step"], 30, 30, 1800, 600, walltime=864_000)
        assert row["released"] == expected_goodput(released, 24 / mtbf, work)
