"""Where the time of an attempt goes, and what the whole run has taken: kept from attempt to attempt in the manifests of
its commits, under ``accounting``."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

OutsideSteps = Literal["evaluation", "checkpoint"]


@dataclass(frozen=True)
class Elapsed:
    """Seconds of an attempt, on one rank: all, and those among them that went to evaluation and to checkpoints."""

    total: float
    evaluation: float
    checkpoint: float

    def since(self, other: "Elapsed") -> "Elapsed":
        return Elapsed(self.total - other.total, self.evaluation - other.evaluation, self.checkpoint - other.checkpoint)

    @property
    def steps(self) -> float:
        """Seconds that went to steps, waiting for data included."""
        return self.total - self.evaluation - self.checkpoint


class AttemptClock:
    """The clock of an attempt, on this rank; it starts when it is made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._outside: dict[OutsideSteps, float] = {"evaluation": 0.0, "checkpoint": 0.0}

    def now(self) -> Elapsed:
        return Elapsed(time.perf_counter() - self._began, self._outside["evaluation"], self._outside["checkpoint"])

    @contextmanager
    def outside_steps(self, what: OutsideSteps) -> Generator[None]:
        """The time inside is counted as ``what``, not as part of a step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._outside[what] += time.perf_counter() - began


@dataclass(frozen=True)
class Accounting:
    """Sums over the steps that a commit keeps: steps after it that were lost are not counted.

    ``tokens`` and ``flops`` (forward and backward of the images, without padding and recomputation) are exact, on any
    number of ranks. ``device_seconds`` is the time of all attempts, each multiplied by its processes, ``step_seconds``
    the part that went to steps, ``evaluation_seconds`` that of validation and pictures. A fork inherits its parent's
    tokens, FLOPs and device seconds.
    """

    tokens: int = 0
    flops: int = 0
    device_seconds: float = 0.0
    step_seconds: float = 0.0
    evaluation_seconds: float = 0.0

    @classmethod
    def of(cls, recorded: dict[str, Any], fork: bool = False) -> "Accounting":
        """From the manifest of a commit; all are 0 if it has none."""
        kept = {k: v for k, v in recorded.items() if not (fork and k in ("step_seconds", "evaluation_seconds"))}
        return cls(**kept)

    def record(self) -> dict[str, float]:
        """As a manifest holds it."""
        return asdict(self)
