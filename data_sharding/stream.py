"""From shards to packed batches: what one rank trains on, step by step, prefetched in a thread.

The state of a loader is its next step and the ledger. Threads, never processes: a forked child of a process that holds
network connections can hang.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import numpy as np

from data_sharding.connect import Abandoned
from data_sharding.deal import Cost, Dealt, Shape, deal
from data_sharding.errors import DataError, StorageDown
from data_sharding.frames import FrameLost, FrameReader
from data_sharding.ledger import Ledger, Loss, frame_of
from data_sharding.packing import PackLayout, lay_out
from data_sharding.plan import RESIZE, Plan, StepSet
from data_sharding.shard import Sample

_READERS = 8  # frames read at once
_AHEAD = 16  # most steps prepared ahead; as a rule their bytes end it sooner
_PREFETCH_BYTES = 256 << 20
_TOKEN_BYTES = 16 * 4 + 4 * 8  # of a pack: latents, and where the token lies


@dataclass(frozen=True)
class Pack:
    """One packed batch of images: T tokens, I image slots."""

    layout: PackLayout
    latents: np.ndarray  # float32 (T, 16), zero at padding
    label: np.ndarray  # int64 (I,), of the image that was read
    weight: np.ndarray  # float32 (I,), 1 / images of the step, 0 at padding
    sample_id: np.ndarray  # int64 (I,), of the image that was planned; 0 at padding
    epoch: np.ndarray  # int64 (I,)


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of one step, and what all ranks know of the whole step."""

    step: int
    packs: list[Pack]
    id_sum: int  # of this rank's planned images: sum of hashed ids modulo 2**64, signed
    step_id_sum: int  # of the step, from the plan
    step_lengths: np.ndarray  # int64, tokens of each image of the step
    step_room: int  # tokens that the packs of all ranks have room for
    step_cost_max: int  # of the slowest rank, in the units of Cost
    step_cost_mean: float
    step_substituted: int  # images that the ledger replaced

    @property
    def step_images(self) -> int:
        return len(self.step_lengths)

    @property
    def step_tokens(self) -> int:
        return int(self.step_lengths.sum())


Frame = tuple[int, int]  # (dataset, frame of its manifest)


class FramesLost(DataError):
    """Frames of a step that this rank cannot have. ``Loader.restart`` goes on with others in their place."""

    def __init__(self, losses: Sequence[Loss]):
        super().__init__(losses[0].cause)
        self.losses = tuple(losses)


class FrameCache:
    """Decoded frames, least recently used out first, bounded in bytes (at least one frame is kept)."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._frames: OrderedDict[Frame, tuple[int, list[Sample]]] = OrderedDict()
        self._bytes = 0

    def __contains__(self, frame: Frame) -> bool:
        return frame in self._frames

    def __len__(self) -> int:
        return len(self._frames)

    def get(self, frame: Frame) -> list[Sample]:
        self._frames.move_to_end(frame)
        return self._frames[frame][1]

    def put(self, frame: Frame, samples: list[Sample]) -> None:
        if frame not in self._frames:
            size = sum(view.nbytes for s in samples for view in s.views.values())
            self._frames[frame], self._bytes = (size, samples), self._bytes + size
        self._frames.move_to_end(frame)
        while self._bytes > self.max_bytes and len(self._frames) > 1:
            self._bytes -= self._frames.popitem(last=False)[1][0]


@dataclass
class _Part:
    """This rank's part of a step on its way: where each image lies, and its frames as they come."""

    step: int
    images: StepSet  # rows and labels of substitutes in place
    substituted: int  # images of the whole step
    dealt: Dealt
    place: dict[int, tuple[Frame, int]]  # index into the step -> frame, index in it
    bytes: int  # of its packs
    needs: set[Frame]
    frames: dict[Frame, "Future[list[Sample]]"]


class Loader:
    """Iterates over one rank's StepBatch of each of ``steps``. A context manager: leaving it ends the thread.

    What it holds at any time: ``cache_bytes`` of decoded frames, and ``prefetch_bytes`` of frames and batches of steps
    to come, though never less than one step.
    """

    def __init__(
        self,
        plan: Plan,
        cost: Cost,
        shapes: Sequence[Shape],
        rank: int,
        ranks: int,
        steps: range,
        cache_bytes: int,
        *,
        prefetch_bytes: int = _PREFETCH_BYTES,
        reader: FrameReader | None = None,
        ledger: Ledger | None = None,
    ):
        self.plan, self.cost, self.shapes, self.rank, self.ranks = plan, cost, shapes, rank, ranks
        self.steps, self.prefetch_bytes = steps, prefetch_bytes
        self._closed = threading.Event()
        reader = reader or FrameReader()
        self.reader = replace(reader, patience=replace(reader.patience, abandoned=self._closed))
        self._cache = FrameCache(cache_bytes)
        self._asked: dict[Frame, Future[list[Sample]]] = {}  # not in the cache yet
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        # Shared with the thread, under this lock:
        self._changed = threading.Condition()
        self._ready: deque[tuple[int, StepBatch | BaseException]] = deque()  # (bytes, batch)
        self._next = steps.start  # to hand out
        self._round = 0  # counts restarts
        self._ledger = ledger or Ledger(plan.manifests)

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
        """Raises what the thread met, in its place in the order and again at each call. FramesLost can be helped."""
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

    def restart(self, step: int, ledger: Ledger) -> None:
        """Hands out ``step`` next, it and all behind it by another ledger."""
        with self._changed:
            self._ready.clear()
            self._next, self._ledger, self._round = step, ledger, self._round + 1
            self._changed.notify_all()

    def _work(self) -> None:
        done = -1  # the round that was worked on last
        pool = ThreadPoolExecutor(_READERS, thread_name_prefix="frames")
        try:
            while (begun := self._next_round(done)) is not None:
                done, step, ledger = begun
                try:
                    self._prepare(step, ledger, done, pool)
                except FramesLost as error:
                    self._hand_over(0, error, done)
        except Abandoned:
            return
        except BaseException as error:  # handed to the training thread, which raises it
            self._hand_over(0, error, done)
        finally:
            pool.shutdown(cancel_futures=True)

    def _next_round(self, done: int) -> tuple[int, int, Ledger] | None:
        """(round, first step, ledger) once there is another round than ``done``; None once the loader is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed.is_set() or self._round != done)
            return None if self._closed.is_set() else (self._round, self._next, self._ledger)

    def _prepare(self, step: int, ledger: Ledger, round_: int, pool: ThreadPoolExecutor) -> None:
        """All steps from ``step`` on, in order, until the loader is closed or restarted."""
        ahead: deque[_Part] = deque()
        part: _Part | None = None  # the next one that has not asked for its frames
        while ahead or step < self.steps.stop:
            while step < self.steps.stop:
                part = part or self._part(step, ledger)
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
                self._hand_over(ready.bytes, self._batch(ready, frames), round_)
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

    def _part(self, step: int, ledger: Ledger) -> _Part:
        images = self.plan.step(step)
        dealt = deal(images.tokens, self.cost, self.ranks, self.shapes)
        lost = ledger.is_lost(images.dataset, images.row)
        if lost.any():
            images = _with_substitutes(images, np.flatnonzero(lost), ledger)
        place, size = {}, len(dealt.packs[self.rank]) * dealt.shape.tokens * _TOKEN_BYTES
        for i in np.concatenate(dealt.packs[self.rank]).tolist():
            dataset, row = int(images.dataset[i]), int(images.row[i])
            manifest = self.plan.manifests[dataset]
            f = frame_of(manifest, row)
            place[i] = (dataset, f), row - int(manifest.frame_first[f])
        return _Part(step, images, int(lost.sum()), dealt, place, size, {frame for frame, _ in place.values()}, {})

    def _ask(self, part: _Part, pool: ThreadPoolExecutor) -> None:
        for frame in sorted(part.needs):
            dataset, f = frame
            if frame in self._cache:
                part.frames[frame] = Future()
                part.frames[frame].set_result(self._cache.get(frame))
                continue
            if frame not in self._asked:
                self._asked[frame] = pool.submit(self.reader.read, self.plan.manifests[dataset], f)
            part.frames[frame] = self._asked[frame]

    def _frames(self, part: _Part, round_: int) -> dict[Frame, list[Sample]] | None:
        """All frames of the part, or None if the loader was closed or restarted.

        Raises:
            FramesLost: some cannot be had; all others have come by then.
            StorageDown: so many do not come that not all can be tried until the deadline.
        """
        patience = self.reader.patience
        give_up = time.monotonic() + patience.deadline + 5 * patience.attempt  # waits and last attempts included
        while wait(part.frames.values(), timeout=0.1).not_done:
            if self._is_stale(round_):
                return None
            if time.monotonic() > give_up:
                raise StorageDown(
                    f"{self.plan.manifests[0].url}: more frames do not come than could be tried in "
                    f"{patience.deadline:.0f} s: check the storage, then start the run again"
                )
        frames, losses = {}, []
        for frame, future in part.frames.items():
            self._asked.pop(frame, None)
            try:
                frames[frame] = future.result()
                self._cache.put(frame, frames[frame])
            except FrameLost as error:
                losses.append(Loss(*frame, str(error)))
        if losses:
            raise FramesLost(losses)
        return frames

    def _batch(self, part: _Part, frames: dict[Frame, list[Sample]]) -> StepBatch:
        images, dealt = part.images, part.dealt
        cost = self.cost.of(images.tokens)
        loads = [sum(int(cost[pack].sum()) for pack in packs) for packs in dealt.packs]
        samples = {i: frames[frame][index] for i, (frame, index) in part.place.items()}
        packs = [self._pack(images, members, samples, dealt.shape) for members in dealt.packs[self.rank]]
        return StepBatch(
            step=part.step,
            packs=packs,
            id_sum=images.id_sum(np.concatenate(dealt.packs[self.rank])),
            step_id_sum=images.id_sum(slice(None)),
            step_lengths=images.tokens,
            step_room=self.ranks * len(packs) * dealt.shape.tokens,
            step_cost_max=max(loads),
            step_cost_mean=sum(loads) / self.ranks,
            step_substituted=part.substituted,
        )

    def _pack(self, images: StepSet, members: np.ndarray, samples: dict[int, Sample], shape: Shape) -> Pack:
        arrays = [  # each (h, w, 16)
            samples[i].views["resize" if images.view[i] == RESIZE else "crop"][images.flip[i]] for i in members.tolist()
        ]
        if not shape.holds(len(arrays), sum(a.shape[0] * a.shape[1] for a in arrays)):
            raise DataError(  # of what is planned all fits; only a shorter substitute leaves more to pad
                "an image that cannot be read has only shorter ones to stand in for it, and its pack no slot left for "
                "the padding: restore the shards that the run's ledger names"
            )
        layout = lay_out([a.shape[:2] for a in arrays], shape)
        latents = np.zeros((shape.tokens, 16), np.float32)
        if arrays:
            latents[: layout.tokens] = np.concatenate([a.reshape(-1, 16) for a in arrays])

        def slots(values: np.ndarray, dtype: type) -> np.ndarray:
            out = np.zeros(shape.images, dtype)
            out[: len(members)] = values
            return out

        return Pack(
            layout=layout,
            latents=latents,
            label=slots(images.label[members], np.int64),
            weight=slots(np.full(len(members), 1 / len(images.tokens)), np.float32),
            sample_id=slots(images.sample_id[members], np.int64),
            epoch=slots(images.epoch[members], np.int64),
        )


def _with_substitutes(images: StepSet, lost: np.ndarray, ledger: Ledger) -> StepSet:
    """Rows and labels of the images to read; ids, epochs, views, flips and lengths stay those that were planned."""
    row, label = images.row.copy(), images.label.copy()
    for i in lost.tolist():
        dataset = int(images.dataset[i])
        row[i] = ledger.row(dataset, int(row[i]), int(images.view[i]))
        label[i] = ledger.manifests[dataset].label[row[i]]
    return replace(images, row=row, label=label)
