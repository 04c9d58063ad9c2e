"""One attempt on one rank: what it holds, and how it loads, records, evaluates and saves."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from data_sharding.storage.retry import RetryPolicy
from data_sharding.stream.disk_cache import DiskCache
from data_sharding.stream.frames import FrameReader
from data_sharding.stream.loader import Loader
from fitv2_scale.checkpoint.checkpointer import Checkpointer, Restored
from fitv2_scale.checkpoint.policy import Cadence
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.world import World
from fitv2_scale.run.run import Attempt, Run
from fitv2_scale.run.substitutions import SubstitutionLog
from fitv2_scale.tracking.journal import Journal
from fitv2_scale.tracking.uploader_process import Uploader
from fitv2_scale.train.batch_audit import Audit
from fitv2_scale.train.batch_broadcast import Relay
from fitv2_scale.train.in_loop_eval import Evaluation
from fitv2_scale.train.metrics.accounting import Times, Totals


@dataclass(frozen=True)
class Session:
    """One attempt, on one rank. ``attempt``, ``journal`` and ``uploader`` are rank 0's alone, ``audit`` is those ranks'
    that read."""

    config: Config
    world: World
    layout: Layout
    relay: Relay
    data: Data
    run: Run
    number: int
    attempt: Attempt | None
    engine: Engine
    checkpoints: Checkpointer
    cadence: Cadence
    restored: Restored | None
    journal: Journal | None
    uploader: Uploader | None
    audit: Audit | None
    substitutions: SubstitutionLog
    evaluation: Evaluation
    times: Times
    totals: Totals  # of the run before this attempt
    notes: list[str]  # sentences for the user: what was passed over, what changes

    @property
    def start(self) -> int:
        """Steps done before this attempt."""
        return self.restored.step if self.restored else 0

    def headline(self) -> str:
        """What this attempt is about to do, and what it could not use."""
        begins = f"goes on at step {self.start}" if self.restored else "begins"
        ranks = f"{self.world.size} rank{'s' if self.world.size > 1 else ''} on {self.world.device.type}"
        shapes = " or ".join(str(shape.tokens) for shape in self.data.shapes)
        headline = f"{self.run.url}: attempt {self.number} {begins} with {ranks}, packs of {shapes} tokens"
        return "\n".join([*self.notes, headline])

    def open_loader(self) -> AbstractContextManager[Loader | None]:
        """None on ranks that do not read."""
        if not self.relay.reads:
            return nullcontext()
        data, config = self.data, self.config.data
        disk = DiskCache(config.cache_dir, int(config.cache_disk_gib * 2**30)) if config.cache_dir else None
        return Loader(
            data.plan,
            data.cost,
            data.shapes,
            self.layout.data_rank(self.world.rank),
            data.nodes,
            range(self.start, self.config.train.steps),
            int(config.cache_gib * 2**30),
            prefetch_bytes=int(config.prefetch_gib * 2**30),
            reader=FrameReader(RetryPolicy(deadline=config.deadline_seconds), disk),
            substitutes=self.substitutions.substitutes,
        )

    def record(self, step: int, metrics: dict[str, float]) -> None:
        if self.journal:
            self.journal.metrics(step, metrics)
        if self.uploader:
            self.uploader.check()

    def evaluate(self, step: int, say: Callable[[str], None]) -> None:
        """Shows what is due after ``step`` steps (see Evaluation)."""
        with self.times.aside("evaluation"):
            self.checkpoints.staged()
            self.evaluation.run(step, say)

    def save(self, step: int, begin: bool, last: bool, totals: Callable[[], Totals]) -> str | None:
        """Learns what came of the save in flight, then begins that of the state after ``step`` steps if ``begin``; if
        ``last``, sees to it that this state is committed. Returns None, or why a save failed."""
        with self.times.aside("checkpoint"):
            return self._save(step, begin, last, totals)

    def _save(self, step: int, begin: bool, last: bool, totals: Callable[[], Totals]) -> str | None:
        failed = self._settle()
        if (begin or last) and self.checkpoints.newest != step and not self.checkpoints.gave_up:
            cursor = replace(self.data.plan.cursor(step), ledger=self.substitutions.substitutes.version)
            seal = self.journal.seal if self.journal else lambda: None
            self.checkpoints.begin(self.engine, step, cursor, seal, totals().accounting())
            self.cadence.saved(step)
            failed = (self._settle() if last else None) or failed
        return failed

    def record_pace(self, step_seconds: float) -> None:
        """On rank 0, once a save has shown how long it takes."""
        if self.attempt and self.checkpoints.seconds:
            self.attempt.record_pace(step_seconds, self.checkpoints.seconds)

    def _settle(self) -> str | None:
        step = self.checkpoints.newest
        failed = self.checkpoints.settle()
        if failed is not None:
            self.record(step, {"failed_saves": self.checkpoints.failed})
        return failed

    def wait_for_staging(self) -> None:
        """When this returns, the optimizer may change the state (see Checkpointer)."""
        with self.times.aside("checkpoint"):
            self.checkpoints.staged()
