"""From shards to packed batches: the batches of one rank, step by step, prefetched in a thread.

The state of a loader is its next step and the substitutes. It uses threads, never processes: a forked child of a
process that holds network connections can hang.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import numpy as np

from data_sharding.errors import DataError, StorageDown
from data_sharding.format.shard import VIEWS, RawFrame
from data_sharding.plan.balance import Cost, Nodes, PackAssignment, assign_packs
from data_sharding.plan.pack_layout import PackShape
from data_sharding.plan.plan import Plan, StepSet
from data_sharding.storage.filesystems import Cancelled
from data_sharding.stream.batch import StepBatch, make_batch, token_bytes
from data_sharding.stream.frames import FrameReader, UnreadableFrame
from data_sharding.stream.memory_cache import FrameKey, MemoryCache
from data_sharding.stream.substitutes import LostFrame, Substitutes, frames_of

_READERS = 8  # frames read at once
_AHEAD = 16  # the most steps prepared ahead; usually the limit in bytes is reached first
_PREFETCH_BYTES = 256 << 20


class SubstitutesNeeded(DataError):
    """Frames of a step cannot be read on this rank. ``Loader.restart`` continues with substitutes."""

    def __init__(self, lost_frames: Sequence[LostFrame]):
        super().__init__(lost_frames[0].cause)
        self.lost_frames = tuple(lost_frames)


@dataclass
class _PendingStep:
    """This rank's part of a step that is being read: where each image is, and the frames that have arrived."""

    step: int
    images: StepSet  # with rows and labels of the substitutes
    substituted: int  # images of the whole step that are replaced
    assignment: PackAssignment
    place: dict[int, tuple[FrameKey, int]]  # index into the step -> (frame, index in the frame)
    bytes: int  # of its packs
    needs: set[FrameKey]  # all its frames
    frames: dict[FrameKey, RawFrame]  # those in memory
    in_flight: "dict[FrameKey, Future[RawFrame]]"  # those requested


class Loader:
    """Iterates over one rank's StepBatch of each of ``steps``. A context manager: entering it starts the thread,
    leaving it ends the thread.

    ``cost``, ``shapes`` (by segment of the plan) and ``nodes`` (ranks of each node) divide a step's images among the
    ranks: see ``plan.balance.assign_packs`` and ``plan.pack_shapes``. Memory: ``cache_bytes`` of decoded frames, and
    ``prefetch_bytes`` of frames and batches of future steps, but at least one step. The process grows by up to 1.6
    times as much (measured): several threads allocate frames, and glibc keeps the gaps that they leave.
    """

    def __init__(
        self,
        plan: Plan,
        cost: Cost,
        shapes: Mapping[int, Sequence[PackShape]],
        rank: int,
        nodes: Nodes,
        steps: range,
        cache_bytes: int,
        *,
        prefetch_bytes: int = _PREFETCH_BYTES,
        reader: FrameReader | None = None,
        substitutes: Substitutes | None = None,
    ):
        self.plan, self.cost, self.shapes, self.rank, self.nodes = plan, cost, shapes, rank, nodes
        self.steps, self.prefetch_bytes = steps, prefetch_bytes
        self._closed = threading.Event()
        reader = reader or FrameReader()
        self.reader = replace(reader, retry=replace(reader.retry, cancelled=self._closed))
        self._cache = MemoryCache(cache_bytes)
        self._requested: dict[FrameKey, Future[RawFrame]] = {}  # frames that are not in the cache yet
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        # Shared with the thread, under this lock:
        self._changed = threading.Condition()
        self._ready: deque[tuple[int, StepBatch | BaseException]] = deque()  # (bytes, batch)
        self._next = steps.start  # the step that ``next`` returns
        self._generation = 0  # counts restarts
        self._substitutes = substitutes or Substitutes(plan.manifests, plan.token_grid)

    def __enter__(self) -> "Loader":
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        """Raises the error of the thread when the failed step is due, and again at each call; after SubstitutesNeeded,
        ``restart`` continues."""
        with self._changed:
            if self._next == self.steps.stop:
                raise StopIteration
            self._changed.wait_for(lambda: self._ready)
            item = self._ready[0][1]
            if isinstance(item, BaseException):
                raise item
            self._ready.popleft()
            self._next += 1
            self._changed.notify_all()
            return item

    def is_ready(self, seconds: float) -> bool:
        """Waits for up to ``seconds`` until ``next`` would not block; whether it would not."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._ready or self._next == self.steps.stop, timeout=seconds))

    def restart(self, step: int, substitutes: Substitutes) -> None:
        """Makes ``step`` the next one; it and all later ones are read with ``substitutes``."""
        with self._changed:
            self._ready.clear()
            self._next, self._substitutes, self._generation = step, substitutes, self._generation + 1
            self._changed.notify_all()

    def _run(self) -> None:
        done = -1  # the last generation that was worked on
        pool = ThreadPoolExecutor(_READERS, thread_name_prefix="frames")
        try:
            while (started := self._next_generation(done)) is not None:
                done, step, substitutes = started
                try:
                    self._prepare_steps(step, substitutes, done, pool)
                except SubstitutesNeeded as error:
                    self._deliver(0, error, done)
        except Cancelled:
            return
        except BaseException as error:  # passed to the training thread, which raises it
            self._deliver(0, error, done)
        finally:
            pool.shutdown(cancel_futures=True)

    def _next_generation(self, done: int) -> tuple[int, int, Substitutes] | None:
        """(generation, first step, substitutes) once it is not ``done``; None once the loader is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed.is_set() or self._generation != done)
            return None if self._closed.is_set() else (self._generation, self._next, self._substitutes)

    def _prepare_steps(self, step: int, substitutes: Substitutes, generation: int, pool: ThreadPoolExecutor) -> None:
        """Delivers all steps from ``step`` on, in order, until the loader is closed or restarted."""
        ahead: deque[_PendingStep] = deque()
        pending: _PendingStep | None = None  # the first one whose frames are not requested yet
        while ahead or step < self.steps.stop:
            while step < self.steps.stop:
                pending = pending or self._pending_step(step, substitutes)
                if not self._has_room(pending, ahead):
                    break
                self._request_frames(pending, pool)
                ahead.append(pending)
                step, pending = step + 1, None
            if ahead:
                frames = self._frames(ahead[0], generation)
                if frames is None:
                    return
                ready = ahead.popleft()
                view = ready.images.view.tolist()
                arrays = {i: frames[frame].view(index, VIEWS[view[i]]) for i, (frame, index) in ready.place.items()}
                batch = make_batch(
                    ready.step,
                    ready.images,
                    ready.assignment,
                    self.cost,
                    self.rank,
                    arrays,
                    ready.substituted,
                    self.plan.token_grid,
                )
                self._deliver(ready.bytes, batch, generation)
            elif pending and not self._wait_for_room(pending, generation):
                return

    def _wait_for_room(self, pending: _PendingStep, generation: int) -> bool:
        """True once there is room; False if the loader was closed or restarted."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stale(generation) or self._has_room(pending, ()))
            return not self._is_stale(generation)

    def _is_stale(self, generation: int) -> bool:
        return self._closed.is_set() or self._generation != generation

    def _has_room(self, pending: _PendingStep, ahead: Sequence[_PendingStep]) -> bool:
        with self._changed:
            held = [size for size, _ in self._ready] + [p.bytes for p in ahead]
        if not held:
            return True
        frames = pending.needs.union(*(p.needs for p in ahead))
        size = sum(int(self.plan.manifests[d].frame_raw_bytes[f]) for d, f in frames if (d, f) not in self._cache)
        return len(held) < _AHEAD and sum(held) + pending.bytes + size <= self.prefetch_bytes

    def _deliver(self, size: int, item: StepBatch | BaseException, generation: int) -> None:
        with self._changed:
            if self._generation == generation:
                self._ready.append((size, item))
                self._changed.notify_all()

    def _pending_step(self, step: int, substitutes: Substitutes) -> _PendingStep:
        images = self.plan.step(step)
        shapes = self.shapes[self.plan.segment_at(step)]
        assignment = assign_packs(images.tokens, self.cost, self.nodes, shapes)
        lost = substitutes.is_lost(images.dataset, images.row)
        if lost.any():
            images = _with_substitutes(images, np.flatnonzero(lost), substitutes)
        place, size = {}, assignment.count * assignment.shape.tokens * token_bytes(self.plan.token_grid)
        mine = np.concatenate(assignment.packs_of(self.rank))
        for dataset, manifest in enumerate(self.plan.manifests):
            which = mine[images.dataset[mine] == dataset]
            frame = frames_of(manifest, images.row[which])
            index = images.row[which] - manifest.frame_first[frame]
            for i, f, at in zip(which.tolist(), frame.tolist(), index.tolist(), strict=True):
                place[i] = (dataset, f), at
        return _PendingStep(
            step, images, int(lost.sum()), assignment, place, size, {frame for frame, _ in place.values()}, {}, {}
        )

    def _request_frames(self, pending: _PendingStep, pool: ThreadPoolExecutor) -> None:
        for frame in sorted(pending.needs):
            dataset, f = frame
            if frame in self._cache:
                pending.frames[frame] = self._cache.get(frame)
                continue
            if frame not in self._requested:
                self._requested[frame] = pool.submit(self.reader.read, self.plan.manifests[dataset], f)
            pending.in_flight[frame] = self._requested[frame]

    def _frames(self, pending: _PendingStep, generation: int) -> dict[FrameKey, RawFrame] | None:
        """All frames of the step, or None if the loader was closed or restarted.

        Raises:
            SubstitutesNeeded: some cannot be read; all others are in the cache by then.
            StorageDown: so many do not arrive that not all of them were tried before the deadline.
        """
        policy = self.reader.retry
        deadline = time.monotonic() + policy.deadline + 5 * policy.attempt  # including the waits and the last attempts
        while wait(pending.in_flight.values(), timeout=0.1).not_done:
            if self._is_stale(generation):
                return None
            if time.monotonic() > deadline:
                raise StorageDown(
                    f"{self.plan.manifests[0].url}: so many frames do not arrive that not all could be tried within "
                    f"{policy.deadline:.0f} s: check the storage, then start the run again"
                )
        lost_frames = []
        for frame, future in pending.in_flight.items():
            self._requested.pop(frame, None)
            try:
                pending.frames[frame] = future.result()
                self._cache.put(frame, pending.frames[frame])
            except UnreadableFrame as error:
                lost_frames.append(LostFrame(*frame, str(error)))
        if lost_frames:
            raise SubstitutesNeeded(lost_frames)
        return pending.frames


def _with_substitutes(images: StepSet, lost: np.ndarray, substitutes: Substitutes) -> StepSet:
    """``images`` with the rows and labels of the substitutes; ids, epochs, views, flips and lengths stay as planned."""
    row, label = images.row.copy(), images.label.copy()
    for i in lost.tolist():
        dataset = int(images.dataset[i])
        row[i] = substitutes.row(dataset, int(row[i]), int(images.view[i]))
        label[i] = substitutes.manifests[dataset].label[row[i]]
    return replace(images, row=row, label=label)
