"""A run played many times over, with failures drawn at random: what ``goodput`` says in a formula, without it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fitv2_scale.planning.forecast.goodput import DAY, Schedule

Draw = Callable[[int], np.ndarray]  # seconds to the next failure, for so many runs


@dataclass(frozen=True)
class Played:
    """Goodput of runs that were played: over all of them together, and what 95 % of them do better than."""

    mean: float
    p5: float
    failures: float  # a run, on average


def play(schedule: Schedule, failures_per_day: float, work: float, runs: int, seed: int = 0) -> Played:
    """``runs`` runs of ``work`` seconds of steps each, with failures at a constant rate."""
    rng, rate = np.random.default_rng(seed), failures_per_day / DAY
    seconds, failures = play_out(schedule, work, runs, lambda n: rng.exponential(1 / rate, n) if rate else _never(n))
    return Played(float(work / seconds.mean()), float(work / np.quantile(seconds, 0.95)), float(failures.mean()))


def _never(runs: int) -> np.ndarray:
    return np.full(runs, np.inf)


def play_out(schedule: Schedule, work: float, runs: int, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """Seconds that each run takes, and its failures. ``draw`` is asked at the begin of every job."""
    s = schedule
    period = s.interval + s.held_up
    done, seconds, failures = np.zeros(runs), np.zeros(runs), np.zeros(runs, int)
    while (left := np.flatnonzero(done < work)).size:
        to_do, fails = work - done[left], draw(left.size)
        # A job starts, works with a save after each interval, and waits for one more when it is through.
        full = s.restart + to_do + s.held_up * np.floor((to_do - 1e-9) / s.interval) + s.durable
        ends = np.minimum(full, s.walltime)
        failed = fails < ends
        trained = np.where(failed, fails, ends) - s.restart
        saved = np.maximum(0, np.floor((trained - s.tail) / period)) * s.interval
        # At a time limit, what was done until the last save began.
        until = np.maximum(0, trained - s.durable)
        kept = np.floor(until / period) * s.interval + np.minimum(until % period, s.interval)
        gained = np.where(failed, saved, np.where(full <= s.walltime, to_do, kept))
        done[left] += gained
        seconds[left] += np.where(failed, fails + s.detect, ends)
        failures[left] += failed
        if not gained.any() and not failed.any():
            raise ValueError(f"jobs of {s.walltime:g} s are too short to get anything done")
    return seconds, failures
