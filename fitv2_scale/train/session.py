"""One attempt on one rank: what it consists of, and how it loads, evaluates and saves."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from data_sharding.storage.retry import RetryPolicy
from data_sharding.stream.disk_cache import DiskCache
from data_sharding.stream.frames import FrameReader
from data_sharding.stream.loader import Loader
from fitv2_scale.checkpoint.checkpointer import Checkpointer
from fitv2_scale.checkpoint.policy import SaveSchedule
from fitv2_scale.checkpoint.restore import Restored
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from fitv2_scale.model.objective import Objective
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.world import World
from fitv2_scale.run.run import Attempt
from fitv2_scale.run.substitutions import SubstitutionLog
from fitv2_scale.train.batch_audit import Audit
from fitv2_scale.train.batch_broadcast import BatchBroadcast
from fitv2_scale.train.in_loop_eval import InLoopEvaluation
from fitv2_scale.train.metrics.accounting import Accounting, AttemptClock
from fitv2_scale.train.recorder import Recorder

_LAST_SAVE_PATIENCE = 20.0  # seconds in which a failed save at the end of an attempt is tried again


@dataclass(frozen=True)
class Session:
    """Made by ``setup.open_session``, on all ranks together."""

    config: Config
    world: World
    layout: Layout
    batch_broadcast: BatchBroadcast
    data: Data
    attempt: Attempt
    engine: Engine
    objective: Objective
    checkpoints: Checkpointer
    save_schedule: SaveSchedule
    restored: Restored | None
    recorder: Recorder
    audit: Audit
    substitutions: SubstitutionLog
    evaluation: InLoopEvaluation
    clock: AttemptClock
    accounting: Accounting  # of the run before this attempt
    notes: list[str]  # sentences for the user: which commits were skipped, what changes

    @property
    def start(self) -> int:
        """Steps done before this attempt."""
        return self.restored.step if self.restored else 0

    def headline(self) -> str:
        """What this attempt is about to do, and what it could not use."""
        starts = f"continues at step {self.start}" if self.restored else "starts"
        ranks = f"{self.world.size} rank{'s' if self.world.size > 1 else ''} on {self.world.device.type}"
        first = self.data.plan.segment_at(self.start)
        tokens = {shape.tokens for k, shapes in self.data.shapes.items() if k >= first for shape in shapes}
        shapes = " or ".join(map(str, sorted(tokens)))
        run, number = self.attempt.run.url, self.attempt.number
        return "\n".join([*self.notes, f"{run}: attempt {number} {starts} with {ranks}, packs of {shapes} tokens"])

    def open_loader(self) -> AbstractContextManager[Loader | None]:
        """None on ranks that do not read."""
        if not self.batch_broadcast.reads:
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

    def evaluate(self, step: int, say: Callable[[str], None], between: Callable[[], None]) -> dict[str, float]:
        """Evaluates what is due after ``step`` steps and returns the losses by name (see InLoopEvaluation.run)."""
        with self.clock.outside_steps("evaluation"):
            self.checkpoints.wait_for_staging()
            return self.evaluation.run(step, self.recorder, say, between)

    def save(self, step: int, start: bool, last: bool, accounting: Callable[[], Accounting]) -> str | None:
        """Finishes the save in flight, then starts that of the state after ``step`` steps if ``start``; if ``last``,
        finishes that one too, and tries it again if it fails. Returns None, or why a save failed."""
        with self.clock.outside_steps("checkpoint"):
            return self._save(step, start, last, accounting)

    def _save(self, step: int, start: bool, last: bool, accounting: Callable[[], Accounting]) -> str | None:
        failed, began = self._finish_save(), time.monotonic()
        while (start or last) and self.checkpoints.newest != step and not self.checkpoints.gave_up:
            cursor = replace(self.data.plan.cursor(step), ledger=self.substitutions.substitutes.version)
            self.checkpoints.start_save(step, cursor, self.recorder.seal, accounting().record())
            self.save_schedule.saved(step)
            if not last:
                break
            failed = self._finish_save() or failed
            if self.checkpoints.newest != step:  # there is no next interval: wait a moment for the storage
                if self.world.broadcast(time.monotonic() - began) > _LAST_SAVE_PATIENCE:
                    break
                time.sleep(2 ** (self.checkpoints.failed_in_a_row - 1))
        return failed

    def _finish_save(self) -> str | None:
        step = self.checkpoints.newest
        failed = self.checkpoints.finish_save()
        if failed is not None:
            self.recorder.metrics(step, {"failed_saves": self.checkpoints.failed_in_a_row})
        return failed

    def record_pace(self, step_seconds: float) -> None:
        """Once a save has shown how long it takes."""
        if self.checkpoints.longest_save:
            self.recorder.pace(step_seconds, self.checkpoints.longest_save)

    def wait_for_staging(self) -> None:
        """When this returns, the optimizer may change the state (see Checkpointer)."""
        with self.clock.outside_steps("checkpoint"):
            self.checkpoints.wait_for_staging()
