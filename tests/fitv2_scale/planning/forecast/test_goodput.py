"""Goodput by a formula, by random simulation, and event by event: all three agree."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitv2_scale.planning.forecast.goodput import DAY, Schedule, expected_goodput
from fitv2_scale.planning.forecast.run_length import (
    RELEASED_DETECT,
    RELEASED_RESTART,
    RELEASED_SAVE,
    RELEASED_STEPS,
)
from fitv2_scale.planning.forecast.save_interval import recommended_interval
from fitv2_scale.planning.forecast.simulate import simulate_goodput, simulate_runs
from tests.support.save_costs import lost_share


def ours(failures_per_day: float, **changes) -> Schedule:
    interval = recommended_interval(0.5, 24 / failures_per_day)
    return Schedule(**{"interval": interval, "stall": 0.5, "durable": 20, "detect": 60, "restart": 120} | changes)


def released(seconds_a_step: float) -> Schedule:
    save = RELEASED_SAVE
    return Schedule(RELEASED_STEPS * seconds_a_step, save, save, RELEASED_DETECT, RELEASED_RESTART)


@pytest.mark.parametrize("per_day", [0.1, 4.0, 16.0, 200.0])
@pytest.mark.parametrize("schedule", [ours, lambda per_day: released(0.0264)], ids=["ours", "released"])
def test_formula_and_simulation_agree(schedule, per_day):
    schedule = schedule(per_day)
    work = max(200 * schedule.interval, 20 * DAY / per_day)
    simulated = simulate_goodput(schedule, per_day, work, runs=2000)
    assert simulated.mean == pytest.approx(expected_goodput(schedule, per_day), rel=0.01)
    awake = work / simulated.mean - simulated.failures * schedule.detect  # nothing fails until a failure is noticed
    assert simulated.failures == pytest.approx(per_day * awake / DAY, rel=0.05)


@pytest.mark.parametrize(
    "nodes,seconds_a_step,per_node_day,fit,here",
    [  # found by a simulation written apart from this one
        (4, 0.0792, 0.0065, 0.913, 0.9994),
        (16, 0.0264, 0.0065, 0.777, 0.9985),
        (4, 0.0792, 0.024, 0.911, 0.9987),
        (16, 0.0264, 0.024, 0.769, 0.9968),
        (4, 0.0792, 1.0, 0.816, 0.983),
        (16, 0.0264, 1.0, 0.533, 0.948),
    ],
)
def test_figures_of_another_simulation(nodes, seconds_a_step, per_node_day, fit, here):
    per_day = nodes * per_node_day
    assert expected_goodput(released(seconds_a_step), per_day) == pytest.approx(fit, abs=0.02)
    assert expected_goodput(ours(per_day, durable=0.5), per_day) == pytest.approx(here, abs=0.008)


@given(
    interval=st.floats(10, 5000),
    save=st.floats(0.1, 60),
    per_day=st.floats(0.01, 50),
    restart=st.floats(0, 900),
)
def test_without_detection_it_is_dalys_formula(interval, save, per_day, restart):
    found = expected_goodput(Schedule(interval, save, save, 0.0, restart), per_day)
    assert found == pytest.approx(1 - lost_share(interval, save, 24 / per_day, restart), rel=1e-9)


def test_rare_failures_cost_what_the_first_order_says():
    """Kokolis et al. (arXiv 2410.21680): (1 - failures · (downtime + half an interval)) / (1 + save / interval)."""
    schedule, per_day = Schedule(600, 3, 3, 200, 100), 0.05
    first_order = (1 - per_day / DAY * (300 + 603 / 2)) / (1 + 3 / 600)
    assert expected_goodput(schedule, per_day) == pytest.approx(first_order, abs=1e-6)


def test_no_failures_and_too_many():
    assert expected_goodput(Schedule(99, 1, 50, 9, 9), 0) == pytest.approx(0.99)
    assert expected_goodput(Schedule(1e6, 1, 1, 9, 9), 1e6) == 0
    # A save that is not through when the next is due holds training up.
    assert expected_goodput(Schedule(60, 1, 100, 9, 9), 0) == pytest.approx(0.6)


@pytest.mark.parametrize("per_day", [2.0, 16.0, 64.0])
def test_the_recommended_interval_is_the_best_one(per_day):
    def goodput(interval: float) -> float:
        return expected_goodput(ours(per_day, stall=5, durable=20, interval=interval), per_day)

    best = recommended_interval(5, 24 / per_day)
    assert 60 < best < 1800  # not clamped
    assert goodput(best) > max(goodput(0.8 * best), goodput(1.25 * best))


def test_jobs_that_end_cost_a_save_and_a_start():
    schedule = Schedule(600, 1, 30, 60, 120, walltime=4 * 3600)
    assert expected_goodput(schedule, 0) == pytest.approx(600 / 601 * (1 - 150 / 14400))
    assert simulate_goodput(schedule, 0, 100 * DAY, 1).mean == pytest.approx(expected_goodput(schedule, 0), rel=1e-3)
    # With failures on top, jobs seldom reach their limit: the formula is then a little too low.
    assert simulate_goodput(schedule, 6, 20 * DAY, 200).mean == pytest.approx(expected_goodput(schedule, 6), rel=0.01)


@pytest.mark.parametrize(
    ("work", "walltime", "seconds"),
    [
        (300, math.inf, 300 + 150),  # one save, at the end
        (600, math.inf, 600 + 150),
        (6000, math.inf, 6000 + 10 + 150),  # the formula counts a wait for the last interval too: ten, not nine
        (10_000, 5000, 10_000 + 10_000 / 600 + 3 * 150),  # a job has 4,850 seconds for steps and waits
    ],
)
def test_a_short_run_pays_for_its_jobs_and_waits_for_the_saves_that_it_makes(work, walltime, seconds):
    schedule = Schedule(600, 1, 30, 60, 120, walltime)
    assert expected_goodput(schedule, 0, work) == pytest.approx(work / seconds, rel=1e-12)
    assert simulate_goodput(schedule, 0, work, 1).mean == pytest.approx(work / seconds, rel=0.002)
    assert expected_goodput(Schedule(100, 1, 30, 60, 120, walltime=150), 0, work) == 0


@pytest.mark.parametrize("durable", [30, 700])  # also one that is due again before it is durable
def test_a_short_run_with_failures(durable):
    schedule = Schedule(600, 1, durable, 60, 120)
    for work in (200, 500):
        simulated = simulate_goodput(schedule, 50, work, 20_000)
        assert expected_goodput(schedule, 50, work) == pytest.approx(simulated.mean, rel=0.02)


def test_few_runs_that_fail_pull_the_mean_below_the_others():
    schedule, per_day, work, runs = Schedule(1800, 0, 0, 300, 200), 0.02, DAY, 4000
    found = simulate_goodput(schedule, per_day, work, runs)
    assert found.failed_runs / runs == pytest.approx(1 - math.exp(-per_day * (DAY + 200) / DAY), abs=0.005)
    undisturbed = DAY / (DAY + 200)
    assert found.lowest < found.mean < found.p5 == pytest.approx(undisturbed)
    assert found.lowest > DAY / (DAY + 200 + 3 * (1800 + 300 + 200))  # three failures would be one run in a million
    calm = simulate_goodput(schedule, 0, work, runs)
    assert calm.lowest == calm.mean == calm.p5 == pytest.approx(undisturbed) and calm.failed_runs == 0


def test_jobs_too_short_for_anything_are_reported():
    with pytest.raises(ValueError, match="too short"):
        simulate_goodput(Schedule(600, 1, 30, 60, 120, walltime=100), 0, DAY, 1)


def walk(s: Schedule, work: float, gaps: list[float]) -> float:
    """Seconds of one run, event by event: job k fails ``gaps[k]`` after its begin, those behind the list never do."""
    kept, clock, gaps = 0.0, 0.0, iter(gaps)
    while True:
        fails, at, done, counts = next(gaps, math.inf), s.restart, kept, []
        closing = s.walltime - s.durable
        while True:
            piece = min(s.interval, work - done)
            if at + piece > closing:  # at the time limit: what is done until the last save begins
                done, at = done + max(0.0, closing - at), s.walltime
                counts.append((at, done))
                break
            at, done = at + piece, done + piece
            counts.append((at + s.durable, done))
            if done >= work:
                at += s.durable
                break
            at += s.wait_per_save
        if fails >= at:
            clock, kept = clock + at, done
            if kept >= work:
                return clock
        else:
            clock += fails + s.detect
            kept = max([done for when, done in counts if when <= fails], default=kept)


@settings(max_examples=200)
@given(
    interval=st.integers(20, 300),
    stall=st.integers(0, 20),
    more=st.integers(0, 400),
    detect=st.integers(0, 100),
    restart=st.integers(0, 100),
    walltime=st.one_of(st.just(math.inf), st.integers(1500, 4000)),
    gaps=st.lists(st.floats(0, 3000), max_size=6),
)
def test_a_simulated_run_is_the_run_event_by_event(interval, stall, more, detect, restart, walltime, gaps):
    schedule = Schedule(interval, stall, stall + more, detect, restart, walltime)
    draws = iter([np.array([gap]) for gap in gaps])
    seconds, _ = simulate_runs(schedule, 5000.0, 1, lambda n: next(draws, np.array([np.inf])))
    assert seconds[0] == pytest.approx(walk(schedule, 5000.0, gaps), abs=1e-3)
