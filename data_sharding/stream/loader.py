"""From shards to packed batches: what one rank trains on, step by step, prefetched in a thread.

The state of a loader is its next step and the substitutes. Threads, never processes: a forked child of a process that
holds network connections can hang.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import numpy as np

from data_sharding.errors import DataError, StorageDown
from data_sharding.format.shard import VIEWS, RawFrame
from data_sharding.plan.balance import Cost, Nodes, PackAssignment, assign_packs
from data_sharding.plan.pack_layout import PackShape
from data_sharding.plan.plan import Plan, StepSet
from data_sharding.storage.filesystems import Cancelled
from data_sharding.stream.batch import TOKEN_BYTES, StepBatch, make_batch
from data_sharding.stream.frames import FrameReader, UnreadableFrame
from data_sharding.stream.memory_cache import Frame, MemoryCache
from data_sharding.stream.substitutes import LostFrame, Substitutes, frames_of

_READERS = 8  # frames read at once
_AHEAD = 16  # most steps prepared ahead; as a rule their bytes end it sooner
_PREFETCH_BYTES = 256 << 20


class SubstitutesNeeded(DataError):
    """Frames of a step cannot be read on this rank. ``Loader.restart`` continues with substitutes."""

    def __init__(self, lost_frames: Sequence[LostFrame]):
        super().__init__(lost_frames[0].cause)
        self.lost_frames = tuple(lost_frames)


@dataclass
class _Part:
    """This rank's part of a step on its way: where each image lies, and its frames as they come."""

    step: int
    images: StepSet  # rows and labels of substitutes in place
    substituted: int  # images of the whole step
    assignment: PackAssignment
    place: dict[int, tuple[Frame, int]]  # index into the step -> frame, index in it
    bytes: int  # of its packs
    needs: set[Frame]
    frames: dict[Frame, RawFrame]  # those that were in memory
    coming: "dict[Frame, Future[RawFrame]]"


class Loader:
    """Iterates over one rank's StepBatch of each of ``steps``. A context manager: leaving it ends the thread.

    What it holds at any time: ``cache_bytes`` of decoded frames, and ``prefetch_bytes`` of frames and batches of steps
    to come, though never less than one step. The process grows by up to 1.6 times as much (measured): frames are
    allocated by several threads, and glibc keeps the gaps that they leave.
    """

    def __init__(
        self,
        plan: Plan,
        cost: Cost,
        shapes: Sequence[PackShape],
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
        self._asked: dict[Frame, Future[RawFrame]] = {}  # not in the cache yet
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        # Shared with the thread, under this lock:
        self._changed = threading.Condition()
        self._ready: deque[tuple[int, StepBatch | BaseException]] = deque()  # (bytes, batch)
        self._next = steps.start  # to hand out
        self._round = 0  # counts restarts
        self._substitutes = substitutes or Substitutes(plan.manifests)

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
        """Whether ``next`` need not wait, or no longer does after so many seconds."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._ready or self._next == self.steps.stop, timeout=seconds))

    def restart(self, step: int, substitutes: Substitutes) -> None:
        """Continues with ``step``; it and all later ones are read with ``substitutes``."""
        with self._changed:
            self._ready.clear()
            self._next, self._substitutes, self._round = step, substitutes, self._round + 1
            self._changed.notify_all()

    def _work(self) -> None:
        done = -1  # the round that was worked on last
        pool = ThreadPoolExecutor(_READERS, thread_name_prefix="frames")
        try:
            while (begun := self._next_round(done)) is not None:
                done, step, substitutes = begun
                try:
                    self._prepare(step, substitutes, done, pool)
                except SubstitutesNeeded as error:
                    self._hand_over(0, error, done)
        except Cancelled:
            return
        except BaseException as error:  # handed to the training thread, which raises it
            self._hand_over(0, error, done)
        finally:
            pool.shutdown(cancel_futures=True)

    def _next_round(self, done: int) -> tuple[int, int, Substitutes] | None:
        """(round, first step, substitutes) once there is a round after ``done``; None once the loader is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed.is_set() or self._round != done)
            return None if self._closed.is_set() else (self._round, self._next, self._substitutes)

    def _prepare(self, step: int, substitutes: Substitutes, round_: int, pool: ThreadPoolExecutor) -> None:
        """All steps from ``step`` on, in order, until the loader is closed or restarted."""
        ahead: deque[_Part] = deque()
        part: _Part | None = None  # the next one that has not asked for its frames
        while ahead or step < self.steps.stop:
            while step < self.steps.stop:
                part = part or self._part(step, substitutes)
                if not self._has_room(part, ahead):
                    break
                self._ask(part, pool)
                ahead.append(part)
                step, part = step + 1, None
            if ahead:
                frames = self._frames(ahead[0], round_)
                if frames is None:
                    return
                ready = ahead.popleft()
                view = ready.images.view.tolist()
                arrays = {i: frames[frame].view(index, VIEWS[view[i]]) for i, (frame, index) in ready.place.items()}
                batch = make_batch(
                    ready.step, ready.images, ready.assignment, self.cost, self.rank, arrays, ready.substituted
                )
                self._hand_over(ready.bytes, batch, round_)
            elif not self._wait_for_room(part, round_):
                return

    def _wait_for_room(self, part: _Part, round_: int) -> bool:
        """False if the loader was closed or restarted instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stale(round_) or self._has_room(part, ()))
            return not self._is_stale(round_)

    def _is_stale(self, round_: int) -> bool:
        return self._closed.is_set() or self._round != round_

    def _has_room(self, part: _Part, ahead: Sequence[_Part]) -> bool:
        with self._changed:
            held = [size for size, _ in self._ready] + [p.bytes for p in ahead]
        if not held:
            return True
        frames = part.needs.union(*(p.needs for p in ahead))
        size = sum(int(self.plan.manifests[d].frame_raw_bytes[f]) for d, f in frames if (d, f) not in self._cache)
        return len(held) < _AHEAD and sum(held) + part.bytes + size <= self.prefetch_bytes

    def _hand_over(self, size: int, item: StepBatch | BaseException, round_: int) -> None:
        with self._changed:
            if self._round == round_:
                self._ready.append((size, item))
                self._changed.notify_all()

    def _part(self, step: int, substitutes: Substitutes) -> _Part:
        images = self.plan.step(step)
        assignment = assign_packs(images.tokens, self.cost, self.nodes, self.shapes)
        lost = substitutes.is_lost(images.dataset, images.row)
        if lost.any():
            images = _with_substitutes(images, np.flatnonzero(lost), substitutes)
        place, size = {}, len(assignment.packs[self.rank]) * assignment.shape.tokens * TOKEN_BYTES
        mine = np.concatenate(assignment.packs[self.rank])
        for dataset, manifest in enumerate(self.plan.manifests):
            which = mine[images.dataset[mine] == dataset]
            frame = frames_of(manifest, images.row[which])
            index = images.row[which] - manifest.frame_first[frame]
            for i, f, at in zip(which.tolist(), frame.tolist(), index.tolist(), strict=True):
                place[i] = (dataset, f), at
        return _Part(
            step, images, int(lost.sum()), assignment, place, size, {frame for frame, _ in place.values()}, {}, {}
        )

    def _ask(self, part: _Part, pool: ThreadPoolExecutor) -> None:
        for frame in sorted(part.needs):
            dataset, f = frame
            if frame in self._cache:
                part.frames[frame] = self._cache.get(frame)
                continue
            if frame not in self._asked:
                self._asked[frame] = pool.submit(self.reader.read, self.plan.manifests[dataset], f)
            part.coming[frame] = self._asked[frame]

    def _frames(self, part: _Part, round_: int) -> dict[Frame, RawFrame] | None:
        """All frames of the part, or None if the loader was closed or restarted.

        Raises:
            SubstitutesNeeded: some cannot be read; all others have come by then.
            StorageDown: so many do not come that not all can be tried until the deadline.
        """
        policy = self.reader.retry
        give_up = time.monotonic() + policy.deadline + 5 * policy.attempt  # waits and last attempts included
        while wait(part.coming.values(), timeout=0.1).not_done:
            if self._is_stale(round_):
                return None
            if time.monotonic() > give_up:
                raise StorageDown(
                    f"{self.plan.manifests[0].url}: more frames do not come than could be tried in "
                    f"{policy.deadline:.0f} s: check the storage, then start the run again"
                )
        lost_frames = []
        for frame, future in part.coming.items():
            self._asked.pop(frame, None)
            try:
                part.frames[frame] = future.result()
                self._cache.put(frame, part.frames[frame])
            except UnreadableFrame as error:
                lost_frames.append(LostFrame(*frame, str(error)))
        if lost_frames:
            raise SubstitutesNeeded(lost_frames)
        return part.frames


def _with_substitutes(images: StepSet, lost: np.ndarray, substitutes: Substitutes) -> StepSet:
    """Rows and labels of the images to read; ids, epochs, views, flips and lengths stay those that were planned."""
    row, label = images.row.copy(), images.label.copy()
    for i in lost.tolist():
        dataset = int(images.dataset[i])
        row[i] = substitutes.row(dataset, int(row[i]), int(images.view[i]))
        label[i] = substitutes.manifests[dataset].label[row[i]]
    return replace(images, row=row, label=label)
