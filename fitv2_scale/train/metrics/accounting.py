"""Where the time of an attempt goes, and what the whole run has taken: kept from attempt to attempt in the manifests of
its commits, under ``accounting``."""

import time
from collections.abc import Generator, Hashable
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from typing import Any, Literal

OutsideSteps = Literal["evaluation", "checkpoint", "compile"]


@dataclass(frozen=True)
class Elapsed:
    """Seconds of an attempt, on one rank: all, and those among them that went to evaluation, to checkpoints and to the
    first step of each shape of packs, in which kernels are compiled and chosen and connections made."""

    total: float
    evaluation: float
    checkpoint: float
    compile: float

    def since(self, other: "Elapsed") -> "Elapsed":
        return Elapsed(*(mine - before for mine, before in zip(astuple(self), astuple(other), strict=True)))

    @property
    def training(self) -> float:
        """Seconds that went to steps, waiting for data and the first steps included."""
        return self.total - self.evaluation - self.checkpoint


class AttemptClock:
    """The clock of an attempt, on this rank; it starts when it is made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._outside: dict[OutsideSteps, float] = {"evaluation": 0.0, "checkpoint": 0.0, "compile": 0.0}
        self._shapes: set[Hashable] = set()

    def now(self) -> Elapsed:
        return Elapsed(time.perf_counter() - self._began, **self._outside)

    @contextmanager
    def outside_steps(self, what: OutsideSteps) -> Generator[None]:
        """The time inside is counted as ``what``, not as part of a step, but for what is counted as other inside."""
        began, others = time.perf_counter(), sum(self._outside.values())
        try:
            yield
        finally:
            self._outside[what] += time.perf_counter() - began - (sum(self._outside.values()) - others)

    @contextmanager
    def step(self, shape: Hashable) -> Generator[None]:
        """The host's work for a step on packs of ``shape``. The first time in an attempt this is counted as compile,
        all of it: what a step would take without compilation is not known yet."""
        if shape in self._shapes:
            yield
            return
        self._shapes.add(shape)
        with self.outside_steps("compile"):
            yield


@dataclass(frozen=True)
class Accounting:
    """Sums over the steps that a commit keeps: steps after it that were lost are not counted.

    ``tokens`` and ``flops`` (forward and backward of the images, without padding and recomputation) are exact, on any
    number of ranks. ``device_seconds`` is the time of all attempts, each multiplied by its processes, ``step_seconds``
    the part that went to steps, ``evaluation_seconds`` that of validation and pictures, ``compile_seconds`` that of the
    first steps of each attempt (see ``Elapsed``). A fork inherits its parent's tokens, FLOPs and device seconds.
    """

    tokens: int = 0
    flops: int = 0
    device_seconds: float = 0.0
    step_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    compile_seconds: float = 0.0

    @classmethod
    def of(cls, recorded: dict[str, Any], fork: bool = False) -> "Accounting":
        """From the manifest of a commit; all are 0 if it has none."""
        own = ("step_seconds", "evaluation_seconds", "compile_seconds")
        return cls(**{k: v for k, v in recorded.items() if not (fork and k in own)})

    def record(self) -> dict[str, float]:
        """As a manifest holds it."""
        return asdict(self)
