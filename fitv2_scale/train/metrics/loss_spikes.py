"""Notices a loss that is far above those before it. It only tells; nothing in a run depends on it."""

import math

_MEMORY = 100.0  # steps that the running mean and deviation look back
_WARM_UP = 30  # steps before anything is called a spike


class SpikeDetector:
    """Running mean and deviation of the loss, exponentially weighted. It begins anew in every attempt.

    What is called a spike enters the statistics as the highest loss that is none: a burst does not hide itself, and a
    new level is accepted after a while.
    """

    def __init__(self, sigmas: float):
        self._sigmas = sigmas
        self._mean = self._variance = 0.0
        self._seen = 0

    def distance(self, loss: float) -> float | None:
        """How many deviations ``loss`` lies above the mean if that makes it a spike, else None. Learns from it."""
        deviation = math.sqrt(self._variance)
        above = loss - self._mean
        spike = self._seen >= _WARM_UP and above > self._sigmas * deviation > 0
        seen = self._mean + self._sigmas * deviation if spike else loss
        self._seen += 1
        share, step = max(1 / self._seen, 1 / _MEMORY), seen - self._mean
        self._mean += share * step
        self._variance = (1 - share) * (self._variance + share * step * step)
        return above / deviation if spike else None
