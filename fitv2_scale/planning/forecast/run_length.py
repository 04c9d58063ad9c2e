"""From the seconds of a step to the days of a run: when it saves, what that and failures cost, how long it lasts."""

from dataclasses import asdict, dataclass
from typing import Any

from fitv2_scale.config.schema import Config
from fitv2_scale.config.sections import CheckpointConfig
from fitv2_scale.planning.forecast.assumptions import Assumed
from fitv2_scale.planning.forecast.goodput import DAY, Schedule, expected_goodput
from fitv2_scale.planning.forecast.save_interval import mtbf_hours, recommended_interval
from fitv2_scale.planning.forecast.simulate import play

_PLAYED = 400  # runs

# What FiT's released script does: a save every 4,000 steps that training waits for (train_fitv2.py). How long that
# takes, until somebody notices a failure, and until it trains again nobody has published: taken to be the following.
RELEASED_STEPS, RELEASED_SAVE, RELEASED_DETECT, RELEASED_RESTART = 4000, 30.0, 1800.0, 600.0


@dataclass(frozen=True)
class Length:
    """A run on some nodes."""

    goodput: float
    days: float
    gpu_hours: float
    failures: float  # expected


def length(steps: int, seconds_a_step: float, schedule: Schedule, nodes: int, gpus: int, assumed: Assumed) -> Length:
    per_day = nodes * assumed.failures_per_node_day.value
    goodput = expected_goodput(schedule, per_day)
    days = steps * seconds_a_step / goodput / DAY if goodput else float("inf")
    return Length(goodput, days, days * 24 * gpus, days * per_day)


def recommended(config: Config, seconds_a_step: float, nodes: int, assumed: Assumed) -> Schedule:
    """Saves at the interval that loses least time, in whole steps."""
    between_failures = mtbf_hours(nodes, assumed.failures_per_node_day.value)
    best = recommended_interval(assumed.stall_seconds.value, between_failures, assumed.durable_seconds.value)
    return _schedule(config, max(1, round(best / seconds_a_step)) * seconds_a_step, assumed)


def configured(config: Config, seconds_a_step: float, assumed: Assumed) -> Schedule:
    """Saves as the config's section ``checkpoint`` says."""
    return _schedule(config, _configured_seconds(config.checkpoint, seconds_a_step), assumed)


def released(config: Config, seconds_a_step: float) -> Schedule:
    """FiT's own schedule, on the same jobs."""
    return Schedule(
        RELEASED_STEPS * seconds_a_step,
        RELEASED_SAVE,
        RELEASED_SAVE,
        RELEASED_DETECT,
        RELEASED_RESTART,
        config.slurm.walltime_seconds,
    )


def _configured_seconds(checkpoint: CheckpointConfig, seconds_a_step: float) -> float:
    if checkpoint.every_minutes is not None:
        return 60 * checkpoint.every_minutes
    return checkpoint.every_steps * seconds_a_step


def _schedule(config: Config, interval: float, assumed: Assumed) -> Schedule:
    return Schedule(
        interval,
        assumed.stall_seconds.value,
        assumed.durable_seconds.value,
        assumed.detect_seconds.value,
        assumed.restart_seconds.value,
        config.slurm.walltime_seconds,
    )


def goodput_report(
    config: Config, seconds_a_step: float, nodes: int, assumed: Assumed, elsewhere: dict[int, float]
) -> dict[str, Any]:
    """``elsewhere``: seconds of a step on other numbers of nodes, for which FiT's schedule and ours are compared."""
    best, as_set = recommended(config, seconds_a_step, nodes, assumed), configured(config, seconds_a_step, assumed)
    per_day, work = nodes * assumed.failures_per_node_day.value, config.train.steps * seconds_a_step
    played = play(best, per_day, work, _PLAYED)
    beside = [
        {
            "nodes": n,
            "seconds_a_step": seconds,
            "released": _expected(released(config, seconds), n, assumed),
            "ours": _expected(recommended(config, seconds, n, assumed), n, assumed),
        }
        for n, seconds in elsewhere.items()
    ]
    return {
        "expected": expected_goodput(best, per_day),
        "simulated": asdict(played) | {"runs": _PLAYED},
        "as_configured": expected_goodput(as_set, per_day),
        "interval_seconds": best.interval,
        "interval_steps": round(best.interval / seconds_a_step),
        "interval_minutes": best.interval / 60,
        "beside_released": beside,
    }


def _expected(schedule: Schedule, nodes: int, assumed: Assumed) -> float:
    return expected_goodput(schedule, nodes * assumed.failures_per_node_day.value)
