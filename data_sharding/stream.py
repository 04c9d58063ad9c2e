"""From shards to packed batches: what one rank trains on, step by step, prefetched in a thread.

The state of a loader is its next step. Threads, never processes: a forked child of a process that holds network
connections can hang.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data_sharding.deal import Cost, Shape, deal
from data_sharding.frames import Sample, read_frame
from data_sharding.manifest import Manifest
from data_sharding.packing import PackLayout, lay_out
from data_sharding.plan import RESIZE, Plan, StepSet

_READERS = 4  # frames read at once
_AHEAD = 2  # steps prepared ahead


@dataclass(frozen=True)
class Pack:
    """One packed batch of images: T tokens, I image slots."""

    layout: PackLayout
    latents: np.ndarray  # float32 (T, 16), zero at padding
    label: np.ndarray  # int64 (I,)
    weight: np.ndarray  # float32 (I,), 1 / images of the step, 0 at padding
    sample_id: np.ndarray  # int64 (I,), 0 at padding
    epoch: np.ndarray  # int64 (I,)


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of one step, and what all ranks know of the whole step."""

    step: int
    packs: list[Pack]
    id_sum: int  # of this rank's images: sum of hashed ids modulo 2**64, signed
    step_id_sum: int  # of the step, from the plan
    step_lengths: np.ndarray  # int64, tokens of each image of the step
    step_cost_max: int  # of the slowest rank, in the units of Cost
    step_cost_mean: float

    @property
    def step_images(self) -> int:
        return len(self.step_lengths)

    @property
    def step_tokens(self) -> int:
        return int(self.step_lengths.sum())


Frame = tuple[int, int]  # (dataset, frame of its manifest)


class FrameCache:
    """Decoded frames, least recently used out first, bounded in bytes (at least one frame is kept)."""

    def __init__(self, manifests: Sequence[Manifest], max_bytes: int):
        self.manifests, self.max_bytes = manifests, max_bytes
        self._frames: OrderedDict[Frame, tuple[int, list[Sample]]] = OrderedDict()
        self._bytes = 0

    def load(self, frames: Iterable[Frame], pool: ThreadPoolExecutor) -> dict[Frame, list[Sample]]:
        """All of ``frames``, the missing ones read in parallel. Raises DataError for a frame that cannot be had."""
        wanted = list(frames)
        missing = [f for f in wanted if f not in self._frames]
        read = dict(zip(missing, pool.map(lambda f: read_frame(self.manifests[f[0]], f[1]), missing), strict=True))
        held = {f: read[f] if f in read else self._frames[f][1] for f in wanted}
        for f, samples in held.items():
            if f in read:
                size = sum(view.nbytes for s in samples for view in s.views.values())
                self._frames[f], self._bytes = (size, samples), self._bytes + size
            self._frames.move_to_end(f)
        while self._bytes > self.max_bytes and len(self._frames) > 1:
            self._bytes -= self._frames.popitem(last=False)[1][0]
        return held


class Loader:
    """Iterates over one rank's StepBatch of each of ``steps``. A context manager: leaving it ends the thread."""

    def __init__(self, plan: Plan, cost: Cost, shape: Shape, rank: int, ranks: int, steps: range, cache_bytes: int):
        self.plan, self.cost, self.shape, self.rank, self.ranks = plan, cost, shape, rank, ranks
        self.steps = steps
        self._cache = FrameCache(plan.manifests, cache_bytes)
        self._ready: queue.Queue = queue.Queue(maxsize=_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)

    def __enter__(self) -> "Loader":
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)  # room for a put that waits
            except queue.Empty:
                continue

    def __iter__(self) -> Iterator[StepBatch]:
        """Raises what the thread met, in its place in the order."""
        for _ in self.steps:
            item = self._ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def _work(self) -> None:
        try:
            with ThreadPoolExecutor(_READERS, thread_name_prefix="frames") as pool:
                for step in self.steps:
                    if self._closed.is_set():
                        return
                    self._ready.put(self.load(step, pool))
        except BaseException as error:  # handed to the training thread, which raises it
            self._ready.put(error)

    def load(self, step: int, pool: ThreadPoolExecutor) -> StepBatch:
        images = self.plan.step(step)
        dealt = deal(images.tokens, self.cost, self.ranks, self.shape)
        cost = self.cost.of(images.tokens)
        loads = [sum(int(cost[pack].sum()) for pack in packs) for packs in dealt]
        mine = np.concatenate(dealt[self.rank])
        samples = self._samples(images, mine, pool)
        packs = [self._pack(images, members, samples) for members in dealt[self.rank]]
        return StepBatch(
            step=step,
            packs=packs,
            id_sum=images.id_sum(mine),
            step_id_sum=images.id_sum(slice(None)),
            step_lengths=images.tokens,
            step_cost_max=max(loads),
            step_cost_mean=sum(loads) / self.ranks,
        )

    def _samples(self, images: StepSet, members: np.ndarray, pool: ThreadPoolExecutor) -> dict[int, Sample]:
        """The stored sample of each member (an index into the step)."""
        place = {}  # member -> (frame, index in it)
        for i in members.tolist():
            dataset, row = int(images.dataset[i]), int(images.row[i])
            first = self.plan.manifests[dataset].frame_first
            frame = int(np.searchsorted(first, row, side="right")) - 1
            place[i] = (dataset, frame), row - int(first[frame])
        held = self._cache.load(sorted({frame for frame, _ in place.values()}), pool)
        return {i: held[frame][index] for i, (frame, index) in place.items()}

    def _pack(self, images: StepSet, members: np.ndarray, samples: dict[int, Sample]) -> Pack:
        arrays = [  # each (h, w, 16)
            samples[i].views["resize" if images.view[i] == RESIZE else "crop"][images.flip[i]] for i in members.tolist()
        ]
        layout = lay_out([a.shape[:2] for a in arrays], self.shape)
        latents = np.zeros((self.shape.tokens, 16), np.float32)
        if arrays:
            latents[: layout.tokens] = np.concatenate([a.reshape(-1, 16) for a in arrays])

        def slots(values: np.ndarray, dtype: type) -> np.ndarray:
            out = np.zeros(self.shape.images, dtype)
            out[: len(members)] = values
            return out

        return Pack(
            layout=layout,
            latents=latents,
            label=slots(images.label[members], np.int64),
            weight=slots(np.full(len(members), 1 / self.plan.images), np.float32),
            sample_id=slots(images.sample_id[members], np.int64),
            epoch=slots(images.epoch[members], np.int64),
        )
