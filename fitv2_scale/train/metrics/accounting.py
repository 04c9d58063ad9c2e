"""What a run has taken so far, carried from attempt to attempt in the manifests of its commits; and where time goes."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

Aside = Literal["evaluation", "checkpoint"]


@dataclass(frozen=True)
class Moment:
    """Seconds of an attempt, on one rank: since it began, and those of them that were set aside."""

    elapsed: float
    evaluation: float
    checkpoint: float

    def since(self, other: "Moment") -> "Moment":
        return Moment(
            self.elapsed - other.elapsed, self.evaluation - other.evaluation, self.checkpoint - other.checkpoint
        )

    @property
    def steps(self) -> float:
        """Seconds that were not set aside."""
        return self.elapsed - self.evaluation - self.checkpoint


class Times:
    """The clock of an attempt, on this rank; it begins when this is made."""

    def __init__(self) -> None:
        self._began, self._aside = time.perf_counter(), Counter()

    def now(self) -> Moment:
        return Moment(time.perf_counter() - self._began, self._aside["evaluation"], self._aside["checkpoint"])

    @contextmanager
    def aside(self, what: Aside) -> Iterator[None]:
        """What happens inside is no part of a step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._aside[what] += time.perf_counter() - began


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
