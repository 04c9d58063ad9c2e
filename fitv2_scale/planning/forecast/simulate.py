"""Simulates many runs with random failures: finds the goodput that ``goodput`` computes by a formula."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fitv2_scale.planning.forecast.goodput import DAY, Schedule

Draw = Callable[[int], np.ndarray]  # seconds to the next failure, for so many runs


@dataclass(frozen=True)
class SimulatedGoodput:
    """Goodput of simulated runs."""

    mean: float  # over all runs together; the few that fail can pull it below p5
    p5: float  # 95 % of the runs have it, or more
    lowest: float  # of a run
    failures: float  # per run, on average
    failed_runs: int  # runs with a failure or more


def simulate_goodput(
    schedule: Schedule, failures_per_day: float, work: float, runs: int, seed: int = 0
) -> SimulatedGoodput:
    """The goodput of ``runs`` runs of ``work`` seconds of steps each, with failures at a constant rate."""
    rng, rate = np.random.default_rng(seed), failures_per_day / DAY
    seconds, failures = simulate_runs(
        schedule, work, runs, lambda n: rng.exponential(1 / rate, n) if rate else _never(n)
    )
    return SimulatedGoodput(
        float(work / seconds.mean()),
        float(work / np.quantile(seconds, 0.95)),
        float(work / seconds.max()),
        float(failures.mean()),
        int(np.count_nonzero(failures)),
    )


def _never(runs: int) -> np.ndarray:
    return np.full(runs, np.inf)


def simulate_runs(schedule: Schedule, work: float, runs: int, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """The duration of each run in seconds and its number of failures. ``draw`` is called at the start of every job."""
    s = schedule
    period = s.interval + s.wait_per_save
    done, seconds, failures = np.zeros(runs), np.zeros(runs), np.zeros(runs, int)
    while (left := np.flatnonzero(done < work)).size:
        to_do, fails = work - done[left], draw(left.size)
        # A job starts, saves after each interval of work, and waits for one more save at the end.
        full = s.restart + to_do + s.wait_per_save * np.floor((to_do - 1e-9) / s.interval) + s.durable
        ends = np.minimum(full, s.walltime)
        failed = fails < ends
        trained = np.where(failed, fails, ends) - s.restart
        saved = np.maximum(0, np.floor((trained - s.until_durable) / period)) * s.interval
        # At the time limit, the work done until the last save started.
        until = np.maximum(0, trained - s.durable)
        kept = np.floor(until / period) * s.interval + np.minimum(until % period, s.interval)
        gained = np.where(failed, saved, np.where(full <= s.walltime, to_do, kept))
        done[left] += gained
        seconds[left] += np.where(failed, fails + s.detect, ends)
        failures[left] += failed
        if not gained.any() and not failed.any():
            raise ValueError(f"jobs of {s.walltime:g} s are too short to make any progress")
    return seconds, failures
