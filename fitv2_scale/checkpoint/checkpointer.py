"""Saving and retiring commits of a run.

A save writes data, then a manifest with the digests of each file, then COMMIT in the run's log: without that entry
there is no checkpoint. All of it happens in the background: training waits only for a copy of the state in memory (see
``staging``).
"""

import logging
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import cached_property

import torch
from torch.distributed.checkpoint.api import CheckpointException

from data_sharding.errors import UserError
from data_sharding.plan.plan import Cursor
from fitv2_scale.checkpoint.commit import (
    cause_of,
    commit_folder,
    quick_check,
    write_commit,
)
from fitv2_scale.checkpoint.copies import require_equal_copies
from fitv2_scale.checkpoint.policy import to_retire
from fitv2_scale.checkpoint.save_plan import SavePlan
from fitv2_scale.checkpoint.staging import Staging
from fitv2_scale.config.sections import CheckpointConfig
from fitv2_scale.parallel.background import in_background
from fitv2_scale.parallel.boxes import LogicalTensor
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.world import World
from fitv2_scale.run.log import require_newest
from fitv2_scale.run.quarantine import quarantine, quarantined
from fitv2_scale.run.run import Attempt

_TIMEOUT = timedelta(minutes=30)  # for which a rank that has written waits for the others

log = logging.getLogger(__name__)


class Checkpointer:
    """Commits the state of ``engine`` to the run of ``attempt``, on all ranks together: rank 0 writes manifest and log,
    the others only their data. All ranks make it together: it allocates what saves need, as much memory as the state,
    and exchanges what each rank saves.

    At most one save is in flight. ``start_save`` starts it; the state must not change before ``wait_for_staging`` has
    returned; ``finish_save`` waits for the save and tells whether it succeeded. ``newest`` is the step that is
    committed or being saved, to begin with the one that was restored.

    A save that the storage refuses ends nothing: training continues, and saves again at the next interval.
    ``failed_in_a_row`` counts such saves.
    """

    def __init__(
        self,
        engine: Engine,
        attempt: Attempt,
        world: World,
        config: CheckpointConfig = CheckpointConfig(),  # noqa: B008 - immutable
        newest: int = 0,
    ):
        self._engine, self._attempt, self._config = engine, attempt, config
        self.newest = self._committed = newest
        self.failed_in_a_row = self._failed = 0
        self.longest_save = 0.0  # seconds from the start to the COMMIT
        self._saving: Future[None] | None = None
        self._staging = Staging(engine.boxes())
        self._writers = world.apart(_TIMEOUT)
        written = {
            name: logical if engine.copy.writes(logical.split) else LogicalTensor(logical.shape, [])
            for name, logical in self._staging.tensors.items()
        }
        self._plan = SavePlan.of(written, self._writers)

    def start_save(
        self,
        step: int,
        cursor: Cursor,
        before_commit: Callable[[], None] = lambda: None,
        accounting: dict[str, float] | None = None,
    ) -> None:
        """Starts to commit the state after ``step`` steps. The save before must have been finished.

        ``before_commit`` is called on rank 0, in another thread, when all data is durable. ``accounting`` is what the
        run has taken so far; the manifest keeps rank 0's.
        """
        assert self._saving is None, "the save before is still in flight"
        number = self._attempt.number
        # A new name for each try: the COMMIT of the last one, whose reply was lost, may still appear in the log.
        folder = commit_folder(step, number, self._failed)
        header = {"step": step, "attempt": number, "cursor": asdict(cursor), "scalars": self._engine.scalars()}
        header["accounting"] = accounting or {}
        derived = self._engine.derived()
        self._staging.mark(self._live)
        began = time.monotonic()
        self._saving = in_background(
            lambda: self._save(step, folder, header, derived, before_commit, began), name="save"
        )
        self.newest = step

    @cached_property
    def _live(self) -> dict[str, LogicalTensor]:
        """The boxes of the state, listed at the first save: they stay where they are from the first step on."""
        return self._engine.boxes()

    def wait_for_staging(self) -> None:
        """When this returns, the state may change: what is being saved has been copied, or the device will wait."""
        self._staging.wait()

    @property
    def save_ended(self) -> bool:
        """Whether this rank's part of the save in flight has ended, well or not."""
        return self._saving is not None and self._saving.done()

    def finish_save(self) -> str | None:
        """Waits for the save in flight, if there is one. Returns None, or why the storage refused it.

        Raises on all ranks StaleAttempt if a newer attempt took over, and CopiesDiffer if the copies of the state are
        not equal.
        """
        if self._saving is None:
            return None
        saving, self._saving = self._saving, None
        try:
            saving.result()
        except (OSError, UserError) as error:
            failure = f"the save at step {self.newest} failed: {error}"
            log.warning("%s", failure)
            self.newest = self._committed
            self.failed_in_a_row += 1
            self._failed += 1
            return failure
        self.failed_in_a_row, self._committed = 0, self.newest
        return None

    @contextmanager
    def finishing_saves(self) -> Generator[None]:
        """Waits at the end for a save in flight: what it commits is good, however the attempt ends. A second Ctrl-C
        (KeyboardInterrupt) does not wait."""
        try:
            yield
        except Exception:
            with suppress(Exception):
                self.finish_save()
            raise
        self.finish_save()

    def save(self, step: int, cursor: Cursor) -> str | None:
        """``start_save`` and ``finish_save``."""
        self.start_save(step, cursor)
        return self.finish_save()

    def _save(
        self,
        step: int,
        folder: str,
        header: dict,
        derived: dict[str, float],
        before_commit: Callable[[], None],
        began: float,
    ) -> None:
        if self._writers.device.type == "cuda":
            torch.cuda.set_device(self._writers.device)  # a new thread's is GPU 0: every rank would take memory there
        self._staging.copy()
        ranks, run, copy = self._writers, self._attempt.run, self._engine.copy
        scalars = {"step": step, "cursor": header["cursor"], **header["scalars"], **derived}
        require_equal_copies(self._staging.tensors, scalars, copy, ranks)
        try:
            digest = write_commit(run, folder, header, self._plan, ranks)
        except CheckpointException as error:
            ranks.run_on_rank0(lambda: self._discard(folder))
            ranks.run_on_rank0(self._require_newest)
            raise cause_of(error) from error
        ranks.run_on_rank0(lambda: self._commit(step, folder, digest, before_commit))
        self.longest_save = max(self.longest_save, time.monotonic() - began)

    @property
    def gave_up(self) -> bool:
        """True once so many saves in a row have failed that another attempt, elsewhere, is the better choice."""
        return self.failed_in_a_row >= self._config.max_failed

    def _discard(self, folder: str) -> None:
        """Frees the space of a failed save if it can, else `sweep` does: its COMMIT was never tried."""
        with suppress(OSError, UserError):
            self._attempt.run.store.delete_tree(folder)

    def _require_newest(self) -> None:
        """Raises StaleAttempt if a newer attempt has taken over: it removes what this one was writing."""
        with suppress(OSError, UserError):  # the storage does not tell
            require_newest(self._attempt.number, self._attempt.run.log.entries())

    def _commit(self, step: int, folder: str, digest: str, before_commit: Callable[[], None]) -> None:
        before_commit()
        self._attempt.commit(step, folder, digest)
        try:
            self._retire()
        except (OSError, UserError) as error:
            log.warning("old commits were not deleted: %s", error)

    def _retire(self) -> None:
        """Deletes the commits that are no longer needed, after a check of the newest two that stay."""
        run = self._attempt.run
        commits, bad = run.log.commits(), quarantined(run)
        if not to_retire(commits, bad, self._config):
            return
        while problems := {
            entry.n: (entry, problem)
            for entry in [entry for entry in commits if entry.n not in bad][-2:]
            if (problem := quick_check(run, entry))
        }:
            for entry, problem in problems.values():
                quarantine(run, entry, problem)
            bad |= problems.keys()
        for entry in to_retire(commits, bad, self._config):
            self._attempt.retire(entry.n)
            run.store.delete_tree(entry.fields["path"])
