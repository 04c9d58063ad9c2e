"""Saving, restoring and retiring commits of a run.

A save writes data, then a manifest with the digests of each file, then COMMIT in the run's log: until that entry stands
there is no checkpoint. All that goes on in the background: training waits for no more than a copy of the state (see
``staging``). A restore walks the log backwards to the newest commit that is whole; what is not is named, quarantined
with the reason, and never deleted.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from data_sharding.errors import UserError
from data_sharding.plan.plan import Cursor
from fitv2_scale.checkpoint.checksums import Damaged
from fitv2_scale.checkpoint.commit import (
    MOMENTS,
    commit_folder,
    glance,
    open_commit,
    quarantine,
    quarantined,
    write_commit,
)
from fitv2_scale.checkpoint.dcp_storage import BoxReader
from fitv2_scale.checkpoint.dcp_tensor import BoxedTensor
from fitv2_scale.checkpoint.policy import to_retire
from fitv2_scale.checkpoint.staging import Staging
from fitv2_scale.config.sections import CheckpointConfig
from fitv2_scale.parallel.boxes import LogicalTensor
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.world import World
from fitv2_scale.run.log import LogEntry
from fitv2_scale.run.run import Attempt, Run

_TIMEOUT = timedelta(minutes=30)  # for which a rank that has written waits for the others

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    step: int
    cursor: Cursor | None  # None after an import of public weights
    accounting: dict[str, float]  # what was handed to ``begin``; empty if nothing was
    quarantined: list[str]  # a sentence for each newer commit that was passed over


class Checkpointer:
    """Saves and restores on all ranks together. ``attempt`` is rank 0's own; the others only write their data.

    At most one save is in flight. ``begin`` starts it; the state must not change before ``staged`` has returned; what
    came of it is learned by ``settle``, which waits for it. ``newest`` is the step that is committed or on its way.

    A save that the storage does not take is no end: training goes on, and saves again when a save is next due.
    ``failed`` counts how many have failed in a row.
    """

    def __init__(
        self,
        run: Run,
        attempt: Attempt | None,
        number: int,
        world: World,
        config: CheckpointConfig = CheckpointConfig(),  # noqa: B008 - immutable
    ):
        self._run, self._attempt, self._number, self._world, self._config = run, attempt, number, world, config
        self.failed = self.newest = 0
        self.seconds = 0.0  # that the longest save has taken until it counted
        self._failures = self._committed = 0
        self._staging: Staging | None = None
        self._writers: World | None = None  # the same ranks, in a group of the threads that write
        self._saving: Future[None] | None = None
        self._saved: tuple[Engine, dict[str, LogicalTensor]] | None = None

    def prepare(self, engine: Engine) -> None:
        """Allocates what saves of ``engine`` need, so that the first of them takes no longer than the others."""
        if self._staging is None:
            self._staging = Staging(engine.boxes())
            self._writers = replace(self._world, cpu_group=dist.new_group(backend="gloo", timeout=_TIMEOUT))

    def begin(
        self,
        engine: Engine,
        step: int,
        cursor: Cursor,
        before_commit: Callable[[], None] = lambda: None,
        accounting: dict[str, float] | None = None,
    ) -> None:
        """Starts to commit the state after ``step`` steps. The save before must have been settled.

        ``before_commit`` is called on rank 0, in another thread, when all data is durable. ``accounting`` is what the
        run has taken so far; the manifest keeps rank 0's.
        """
        assert self._saving is None, "the save before is still in flight"
        self.prepare(engine)
        # A name of its own for each try: a COMMIT whose reply was lost may still come to stand for the last one.
        folder = commit_folder(step, self._number, self._failures)
        header = {"step": step, "attempt": self._number, "cursor": asdict(cursor), "scalars": engine.scalars()}
        header["accounting"] = accounting or {}
        self._staging.mark(self._live(engine))
        began = time.monotonic()
        self._saving = _in_background(lambda: self._save(step, folder, header, before_commit, began))
        self.newest = step

    def _live(self, engine: Engine) -> dict[str, LogicalTensor]:
        """The boxes of its state, which stay where they are from the first step on; to list them takes time."""
        if self._saved is None or self._saved[0] is not engine:
            self._saved = (engine, engine.boxes())
        return self._saved[1]

    def staged(self) -> None:
        """From here on the state may change: what is being saved of it has been copied, or the device will wait."""
        if self._staging is not None:
            self._staging.wait()

    @property
    def ended(self) -> bool:
        """Whether this rank's part of the save in flight is over, well or not."""
        return self._saving is not None and self._saving.done()

    def settle(self) -> str | None:
        """Waits for the save in flight, if there is one. Returns None, or why the storage did not take it.

        Raises StaleAttempt on all ranks if a newer attempt took over.
        """
        if self._saving is None:
            return None
        saving, self._saving = self._saving, None
        try:
            saving.result()
        except (OSError, UserError) as error:
            failure = f"the save at step {self.newest} failed: {error}"
            log.warning("%s", failure)
            self.failed, self._failures, self.newest = self.failed + 1, self._failures + 1, self._committed
            return failure
        self.failed, self._committed = 0, self.newest
        return None

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Waits at the end for a save in flight: what it commits is good, however the attempt ends. But not if
        somebody is in a hurry (KeyboardInterrupt)."""
        try:
            yield
        except Exception:
            with suppress(Exception):
                self.settle()
            raise
        self.settle()

    def save(
        self, engine: Engine, step: int, cursor: Cursor, before_commit: Callable[[], None] = lambda: None
    ) -> str | None:
        """``begin`` and ``settle``."""
        self.begin(engine, step, cursor, before_commit)
        return self.settle()

    def _save(self, step: int, folder: str, header: dict, before_commit: Callable[[], None], began: float) -> None:
        self._staging.copy()
        run, ranks = self._run, self._writers
        try:
            writer = write_commit(run, folder, ranks.rank, header, self._staging.tensors, ranks.cpu_group)
        except CheckpointException as error:
            ranks.run_on_rank0(lambda: self._discard(folder))
            raise _cause(error) from error
        ranks.run_on_rank0(lambda: self._commit(step, folder, writer.manifest_digest, before_commit))
        self.seconds = max(self.seconds, time.monotonic() - began)

    @property
    def gave_up(self) -> bool:
        """True once so many saves in a row have failed that it is better to start anew elsewhere."""
        return self.failed >= self._config.max_failed

    def _discard(self, folder: str) -> None:
        """Frees what a failed save has taken, if it can; `sweep` does else. Its COMMIT was not even tried."""
        with suppress(OSError, UserError):
            self._run.store.delete_tree(folder)

    def _commit(self, step: int, folder: str, digest: str, before_commit: Callable[[], None]) -> None:
        before_commit()
        self._attempt.commit(step, folder, digest)
        try:
            self._retire()
        except (OSError, UserError) as error:
            log.warning("old commits were not deleted: %s", error)

    def _retire(self) -> None:
        """Deletes what is no longer needed, once the newest two that stay were looked at."""
        commits, bad = self._run.log.commits(), quarantined(self._run)
        if not to_retire(commits, bad, self._config):
            return
        while problems := {
            entry.n: (entry, problem)
            for entry in [entry for entry in commits if entry.n not in bad][-2:]
            if (problem := glance(self._run, entry))
        }:
            for entry, problem in problems.values():
                quarantine(self._run, entry, problem)
            bad |= problems.keys()
        for entry in to_retire(commits, bad, self._config):
            self._attempt.retire(entry.n)
            self._run.store.delete_tree(entry.fields["path"])

    def restore(self, engine: Engine, run: Run, step: int | None = None) -> Restored | None:
        """Fills ``engine`` from the newest whole commit of ``run`` (or the one at ``step``); None if there is none."""
        found = self._world.run_on_rank0(lambda: [asdict(e) for e in reversed(run.log.commits())])
        entries = [LogEntry(**e) for e in found if step is None or e["fields"]["step"] == step]
        passed_over: list[str] = []
        for entry in entries:
            manifest, problem = self._world.run_on_rank0(lambda e=entry: open_commit(run, e))
            problem = problem or self._fill(engine, run, entry, manifest)
            if problem is None:
                cursor = Cursor(**manifest["cursor"]) if manifest["cursor"] else None
                self.newest = self._committed = manifest["step"]
                return Restored(manifest["step"], cursor, manifest.get("accounting", {}), passed_over)
            passed_over.append(f"commit at step {entry.fields['step']} is not whole ({problem}); it was passed over")
            self._world.run_on_rank0(lambda e=entry, p=problem: quarantine(run, e, p))
        if entries:
            raise UserError(f"{run.url}: no commit is whole: " + "; ".join(passed_over))
        return None

    def _fill(self, engine: Engine, run: Run, entry: LogEntry, manifest: dict) -> str | None:
        """Reads the commit into ``engine``; returns what is wrong with it, alike on all ranks."""
        wanted, stored = engine.boxes(), manifest["tensors"].keys()
        if not manifest["moments"]:  # imported weights: the optimizer begins anew
            wanted = {name: logical for name, logical in wanted.items() if not name.startswith(MOMENTS)}
        missing = [name for name in wanted if name not in stored]
        if missing:
            raise UserError(
                f"{run.url}: the commit at step {manifest['step']} holds no {missing[0]}: not this network's"
            )
        state = {name: BoxedTensor(logical) for name, logical in wanted.items()}
        reader = BoxReader(run.store, entry.fields["path"], manifest)
        try:
            dcp.load(state, storage_reader=reader, process_group=self._world.cpu_group)
        except CheckpointException as error:
            cause = _cause(error)
            if isinstance(cause, Damaged):
                return str(cause)
            raise cause from error
        if manifest["moments"]:
            engine.load_scalars(manifest["scalars"])
        engine.loaded()
        return None


def _in_background(work: Callable[[], None]) -> Future[None]:
    """What comes of ``work``, in a thread that does not keep a process alive that has met its end otherwise."""
    future: Future[None] = Future()

    def act() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=act, name="save", daemon=True).start()
    return future


def _cause(error: CheckpointException) -> BaseException:
    """What one of the ranks met: a bug before trouble with the storage, and that before damage."""

    def gravity(cause: BaseException) -> int:
        return 2 if isinstance(cause, Damaged) else 1 if isinstance(cause, OSError | UserError) else 0

    return min((cause for cause, _ in error.failures.values()), key=gravity)
