"""Goodput: the share of a run's time in which it does steps that count.

Failures come independently, at a constant rate λ. A save begins after each interval Δ of work, holds training up for w,
and counts d_s seconds after its begin (a save that is waited for has d_s = w). A failure is noticed after d, then the
job needs R to train again, which a failure may interrupt as well; work since the last save that counts is lost. The
time from one save that counts to the next is then, on average and exactly,

    T = (1/λ + D) · (exp(λ(Δ + w)) - 1) · exp(λ(d_s - w)),   D = d + (1/λ + d) · (exp(λR) - 1),

and goodput is Δ/T. With d = 0 and d_s = w this is eq. 20 of J. T. Daly (2006). Jobs that end at their time limit save
and start anew, which takes d_s + R of each; that factor is exact without failures only. ``simulate`` plays all of it.
"""

import math
from dataclasses import dataclass

DAY = 86400.0


@dataclass(frozen=True)
class Schedule:
    """When a run saves, and what saves, failures and the ends of jobs cost; in seconds."""

    interval: float  # of work between two saves
    stall: float  # w
    durable: float  # d_s
    detect: float
    restart: float
    walltime: float = math.inf

    def __post_init__(self) -> None:
        assert self.interval > 0 and 0 <= self.stall <= self.durable and self.detect >= 0 and self.restart >= 0

    @property
    def held_up(self) -> float:
        """Seconds for which training waits at each save: one begins only when the one before it counts."""
        return max(self.stall, self.durable - self.interval)

    @property
    def tail(self) -> float:
        """Seconds for which a save that training no longer waits for does not count yet."""
        return max(0.0, self.durable - self.held_up)


def expected_goodput(schedule: Schedule, failures_per_day: float) -> float:
    """By the formula above; ``failures_per_day`` are those of all nodes of the job together."""
    s, period = schedule, schedule.interval + schedule.held_up
    rate = failures_per_day / DAY
    if rate == 0:
        share = s.interval / period
    else:
        again = (1 / rate + s.detect) * math.expm1(rate * s.restart)
        try:
            share = s.interval / ((1 / rate + s.detect + again) * math.expm1(rate * period) * math.exp(rate * s.tail))
        except OverflowError:  # failures come so fast that nothing is ever done
            return 0.0
    return share * max(0.0, 1 - (s.restart + s.durable) / s.walltime)
