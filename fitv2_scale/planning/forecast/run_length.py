"""From the seconds of a step to the days of a run: its save schedule, the cost of saves and failures, its length."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from fitv2_scale.config.schema import Config
from fitv2_scale.config.sections import CheckpointConfig
from fitv2_scale.planning.forecast.assumptions import Assumptions
from fitv2_scale.planning.forecast.disk_usage import kept_steps
from fitv2_scale.planning.forecast.goodput import DAY, Schedule, expected_goodput
from fitv2_scale.planning.forecast.save_interval import mtbf_hours, recommended_interval
from fitv2_scale.planning.forecast.simulate import simulate_goodput

_SIMULATED_RUNS = 400

# FiT's released script makes a blocking save every 4,000 steps (train_fitv2.py). The time of a save, the time until
# somebody notices a failure, and the time until training runs again are not published; these values are assumed.
RELEASED_STEPS, RELEASED_SAVE, RELEASED_DETECT, RELEASED_RESTART = 4000, 30.0, 1800.0, 600.0


@dataclass(frozen=True)
class RunLength:
    """Duration and cost of a whole run."""

    goodput: float
    days: float
    gpu_hours: float
    failures: float  # expected


def run_length(
    steps: int, seconds_a_step: float, schedule: Schedule, nodes: int, gpus: int, assumptions: Assumptions
) -> RunLength:
    per_day = nodes * assumptions.failures_per_node_day.value
    goodput = expected_goodput(schedule, per_day, steps * seconds_a_step)
    days = steps * seconds_a_step / goodput / DAY if goodput else float("inf")
    return RunLength(goodput, days, days * 24 * gpus, days * per_day)


def recommended_schedule(config: Config, seconds_a_step: float, nodes: int, assumptions: Assumptions) -> Schedule:
    """Saves at the interval that loses the least time, in whole steps."""
    between_failures = mtbf_hours(nodes, assumptions.failures_per_node_day.value)
    best = recommended_interval(assumptions.stall_seconds.value, between_failures, assumptions.durable_seconds.value)
    return _schedule(config, max(1, round(best / seconds_a_step)) * seconds_a_step, assumptions)


def configured_schedule(config: Config, seconds_a_step: float, assumptions: Assumptions) -> Schedule:
    """Saves at the interval of the config's section ``checkpoint``."""
    return _schedule(config, _configured_interval(config.checkpoint, seconds_a_step), assumptions)


def configured_commits(config: Config, seconds_a_step: float) -> int:
    """Commits that a run makes with its config, at most: at its interval, at steps that are kept, and at the end."""
    steps, checkpoint = config.train.steps, config.checkpoint
    kept = kept_steps(checkpoint, steps)
    if checkpoint.every_minutes is not None:
        return math.ceil(steps * seconds_a_step / (60 * checkpoint.every_minutes)) + len(kept - {steps})
    return len({*range(checkpoint.every_steps, steps, checkpoint.every_steps), steps} | kept)


def released_schedule(config: Config, seconds_a_step: float) -> Schedule:
    """The schedule of FiT's released script, in the same jobs."""
    return Schedule(
        RELEASED_STEPS * seconds_a_step,
        RELEASED_SAVE,
        RELEASED_SAVE,
        RELEASED_DETECT,
        RELEASED_RESTART,
        config.slurm.walltime_seconds,
    )


def _configured_interval(checkpoint: CheckpointConfig, seconds_a_step: float) -> float:
    if checkpoint.every_minutes is not None:
        return 60 * checkpoint.every_minutes
    return checkpoint.every_steps * seconds_a_step


def _schedule(config: Config, interval: float, assumptions: Assumptions) -> Schedule:
    return Schedule(
        interval,
        assumptions.stall_seconds.value,
        assumptions.durable_seconds.value,
        assumptions.detect_seconds.value,
        assumptions.restart_seconds.value,
        config.slurm.walltime_seconds,
    )


def goodput_report(
    config: Config, seconds_a_step: float, nodes: int, assumptions: Assumptions, elsewhere: dict[int, float]
) -> dict[str, Any]:
    """Goodput expected, simulated and as configured, of the whole run. ``elsewhere``: seconds of a step by number of
    nodes, for which FiT's released schedule is compared with ours."""
    best = recommended_schedule(config, seconds_a_step, nodes, assumptions)
    as_set = configured_schedule(config, seconds_a_step, assumptions)
    per_day, work = nodes * assumptions.failures_per_node_day.value, config.train.steps * seconds_a_step
    simulated = simulate_goodput(best, per_day, work, _SIMULATED_RUNS)
    beside = [
        {
            "nodes": n,
            "seconds_a_step": seconds,
            "released": _expected(released_schedule(config, seconds), n, config, seconds, assumptions),
            "ours": _expected(recommended_schedule(config, seconds, n, assumptions), n, config, seconds, assumptions),
        }
        for n, seconds in elsewhere.items()
    ]
    return {
        "expected": expected_goodput(best, per_day, work),
        "simulated": asdict(simulated) | {"runs": _SIMULATED_RUNS},
        "as_configured": expected_goodput(as_set, per_day, work),
        "interval_seconds": best.interval,
        "interval_steps": round(best.interval / seconds_a_step),
        "interval_minutes": best.interval / 60,
        "beside_released": beside,
    }


def _expected(schedule: Schedule, nodes: int, config: Config, seconds_a_step: float, assumptions: Assumptions) -> float:
    per_day = nodes * assumptions.failures_per_node_day.value
    return expected_goodput(schedule, per_day, config.train.steps * seconds_a_step)
