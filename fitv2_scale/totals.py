"""What a run has taken so far, carried from attempt to attempt in the manifests of its commits; and where time goes."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

Aside = Literal["evaluation", "checkpoint"]


class Times:
    """The seconds of an attempt, on this rank: since this was made, and those that its steps had to wait for others."""

    def __init__(self) -> None:
        self._began, self._aside = time.perf_counter(), Counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @contextmanager
    def aside(self, what: Aside) -> Iterator[None]:
        """What happens inside is no part of a step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._aside[what] += time.perf_counter() - began

    def spent(self, what: Aside) -> float:
        """Seconds that were set aside for this so far."""
        return self._aside[what]


@dataclass(frozen=True)
class Totals:
    """Sums over the steps that a commit keeps: what was done after it and lost is not in them.

    ``tokens`` and ``flops`` (forward and backward of the images, without padding and recomputation) are exact, on any
    number of ranks. ``device_seconds`` is the attempts' time, each times its processes, ``step_seconds`` that in which
    they stepped, ``evaluation_seconds`` that of validation and pictures. A fork takes over its parent's tokens, FLOPs
    and device seconds.
    """

    tokens: int = 0
    flops: int = 0
    device_seconds: float = 0.0
    step_seconds: float = 0.0
    evaluation_seconds: float = 0.0

    @classmethod
    def of(cls, accounting: dict[str, float], fork: bool = False) -> "Totals":
        """From the manifest of a commit; of one that has none, all are 0."""
        kept = {k: v for k, v in accounting.items() if not (fork and k in ("step_seconds", "evaluation_seconds"))}
        return cls(**kept)

    def accounting(self) -> dict[str, float]:
        return asdict(self)
