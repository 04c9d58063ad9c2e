"""Goodput: the share of a run's time that is spent on steps that are not lost later.

Failures are independent and come at a constant rate λ. A save starts after each interval Δ of work, stalls training for
w, and is durable d_s seconds after its start (d_s = w for a blocking save). A failure is noticed after d; then the job
needs R until it trains again, which another failure may interrupt; work since the last durable save is lost. The mean
time from one durable save to the next is then exactly

    T = (1/λ + D) · (exp(λ(Δ + w)) - 1) · exp(λ(d_s - w)),   D = d + (1/λ + d) · (exp(λR) - 1),

and goodput is Δ/T. With d = 0 and d_s = w this is eq. 20 of J. T. Daly (2006). Each job of a run starts, and saves at
its end, which takes d_s + R; how many jobs a run takes is exact only without failures. A run of W ≤ Δ saves only at its
end; until it gets through start, work and save it takes (1/λ + d) · (exp(λ(R + W + d_s)) - 1). ``simulate`` finds
goodput without these formulas.
"""

import math
from dataclasses import dataclass

DAY = 86400.0


@dataclass(frozen=True)
class Schedule:
    """When a run saves, and the cost of saves, failures and the ends of jobs; in seconds."""

    interval: float  # work between two saves
    stall: float  # w
    durable: float  # d_s
    detect: float
    restart: float
    walltime: float = math.inf

    def __post_init__(self) -> None:
        assert self.interval > 0 and 0 <= self.stall <= self.durable and self.detect >= 0 and self.restart >= 0

    @property
    def wait_per_save(self) -> float:
        """Seconds for which training waits at each save; a save starts only when the one before it is durable."""
        return max(self.stall, self.durable - self.interval)

    @property
    def until_durable(self) -> float:
        """Seconds from the end of the wait until the save is durable."""
        return max(0.0, self.durable - self.wait_per_save)


def expected_goodput(schedule: Schedule, failures_per_day: float, work: float = math.inf) -> float:
    """Goodput by the formula above, of a run of ``work`` seconds of steps; ``failures_per_day`` is the total of all
    nodes of the job."""
    s, period = schedule, schedule.interval + schedule.wait_per_save
    rate, whole = failures_per_day / DAY, schedule.restart + work + schedule.durable
    try:
        if work <= s.interval and whole <= s.walltime:
            return work / ((1 / rate + s.detect) * math.expm1(rate * whole) if rate else whole)
        if rate == 0:
            share = s.interval / period
        else:
            again = (1 / rate + s.detect) * math.expm1(rate * s.restart)
            per_failure = 1 / rate + s.detect + again
            share = s.interval / (per_failure * math.expm1(rate * period) * math.exp(rate * s.until_durable))
    except OverflowError:  # failures come so fast that no work is ever kept
        return 0.0
    return _with_ends(share, s, work)


def _with_ends(share: float, schedule: Schedule, work: float) -> float:
    """``share`` less what the start and the end of each job take."""
    around = schedule.restart + schedule.durable
    if schedule.walltime <= around or share == 0:
        return 0.0
    if math.isinf(work):
        return share * (1 - around / schedule.walltime)
    seconds = work / share
    jobs = max(1, math.ceil(seconds / (schedule.walltime - around)))
    return work / (seconds + jobs * around)
