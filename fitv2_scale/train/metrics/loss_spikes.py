"""Detects losses far above those before. It only reports them; nothing in a run depends on it."""

import math

_MEMORY = 100.0  # steps over which the running mean and deviation decay
_WARM_UP = 30  # steps before anything is called a spike


class SpikeDetector:
    """Running mean and deviation of the loss, exponentially weighted. Every attempt starts from nothing.

    A spike enters the statistics as the highest loss that is not a spike: a burst does not hide itself, and a new level
    is accepted after a while.
    """

    def __init__(self, sigmas: float):
        self._sigmas = sigmas
        self._mean = self._variance = 0.0
        self._seen = 0

    def distance(self, loss: float) -> float | None:
        """How many deviations ``loss`` lies above the mean if it is a spike, else None. Updates the statistics."""
        deviation = math.sqrt(self._variance)
        above = loss - self._mean
        spike = self._seen >= _WARM_UP and above > self._sigmas * deviation > 0
        seen = self._mean + self._sigmas * deviation if spike else loss
        self._seen += 1
        weight, step = max(1 / self._seen, 1 / _MEMORY), seen - self._mean
        self._mean += weight * step
        self._variance = (1 - weight) * (self._variance + weight * step * step)
        return above / deviation if spike else None
