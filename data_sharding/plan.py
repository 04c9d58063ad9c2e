"""Which images each optimizer step trains on: a pure function of (dataset, seed, batch), blind to ranks and capacity.

An epoch is a keyed permutation of the dataset's frames; epochs are concatenated, so nothing is dropped and no epoch
ends unevenly. The stream is cut into windows of ``window_steps`` steps. A window's images are dealt to its steps by
length strata: sorted by tokens, every run of ``window_steps`` neighbours gives each step one image, the longest to the
step with the fewest tokens so far. All steps then hold nearly equal token totals and the same spread of lengths, and a
keyed shuffle of the steps leaves no trend over time.

Everything is integer arithmetic on keyed draws, with stable sorts: the plan is the same on any machine and with any
NumPy. A change of this file that changes the plan must raise PLANNER_VERSION (a golden digest in the tests watches).
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from data_sharding.errors import UserError
from data_sharding.keyed import Purpose, keyed_order, words, words64
from data_sharding.manifest import Manifest

PLANNER_VERSION = 1
RESIZE, CROP = 0, 1  # the view axis of Manifest.size
MAX_WINDOW_STEPS = 256

Views = Literal["mixed", "resize", "crop"]


@dataclass(frozen=True)
class StepSet:
    """The B images of one step, ordered by (epoch, sample id); every array is (B,)."""

    dataset: np.ndarray  # int64, index into Plan.manifests
    epoch: np.ndarray  # int64, of that dataset
    row: np.ndarray  # int64, row of the manifest
    sample_id: np.ndarray  # int64
    label: np.ndarray  # int64
    view: np.ndarray  # int64, RESIZE or CROP
    flip: np.ndarray  # int64, 1 = mirrored
    tokens: np.ndarray  # int64, length of the chosen view

    def id_sum(self, part: np.ndarray | slice) -> int:
        """Sum of the hashed (epoch, id) of some images, modulo 2**64, signed: parts add up to the whole."""
        hashed = words64(0, Purpose.DATA_ID, self.epoch[part], self.sample_id[part])
        return int(hashed.sum(dtype=np.uint64).astype(np.int64))


@dataclass(frozen=True)
class Cursor:
    """Where a run stands in its data: all the loader state that a checkpoint holds."""

    plan_hash: str
    ledger: int  # version of the ledger of substituted samples
    epoch: int
    window: int
    images: int  # consumed since the run began


class Plan:
    def __init__(self, manifest: Manifest, seed: int, images: int, views: Views):
        if not 1 <= images <= len(manifest.sample_id):
            raise UserError(
                f"batch.images is {images}, but {manifest.url} holds {len(manifest.sample_id)} images: "
                "choose a batch between 1 and that number"
            )
        self.manifest, self.seed, self.images, self.views = manifest, seed, images, views
        self.samples = len(manifest.sample_id)
        # A window within one epoch's size: else a small dataset would mix images of several epochs.
        self.window_steps = min(MAX_WINDOW_STEPS, self.samples // images)
        self._frame_order = lru_cache(maxsize=2)(self._compute_frame_order)
        self._window = lru_cache(maxsize=2)(self._compute_window)

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        return (self.manifest,)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest view that the plan may choose."""
        return int(self.manifest.header.max_tokens)

    @property
    def hash(self) -> str:
        fields = {
            "planner": PLANNER_VERSION,
            "seed": self.seed,
            "datasets": [self.manifest.digest],
            "weights": [1],
            "images": self.images,
            "views": self.views,
            "window_steps": self.window_steps,
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def step(self, step: int) -> StepSet:
        """The images of step ``step``, counted from 0."""
        window, place = divmod(step, self.window_steps)
        return self._window(window)[place]

    def cursor(self, step: int) -> Cursor:
        """The state after ``step`` steps."""
        images = step * self.images
        return Cursor(self.hash, 0, images // self.samples, step // self.window_steps, images)

    def _compute_window(self, window: int) -> list[StepSet]:
        size = self.window_steps * self.images
        epoch, row = self._stream(window * size, size)
        ids = self.manifest.sample_id[row]
        order = np.argsort(words64(self.seed, Purpose.SAMPLE_ORDER, epoch, ids), kind="stable")
        epoch, row, ids = epoch[order], row[order], ids[order]
        view, tokens = self._choose_views(epoch, row, ids)
        flip = (words(self.seed, Purpose.FLIP, epoch, ids) & 1).astype(np.int64)

        step_of = deal_strata(tokens, self.window_steps)
        shuffled = keyed_order(self.seed, Purpose.STEP_ORDER, 0, window * self.window_steps + self._step_range())
        steps = []
        for k in shuffled:
            members = np.flatnonzero(step_of == k)
            members = members[np.lexsort((ids[members], epoch[members]))]
            label = self.manifest.label[row[members]].astype(np.int64)
            e, r, i = (c[members] for c in (epoch, row, ids))
            steps.append(StepSet(np.zeros_like(e), e, r, i, label, view[members], flip[members], tokens[members]))
        return steps

    def _step_range(self) -> np.ndarray:
        return np.arange(self.window_steps)

    def _stream(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, row) of the positions start .. start + count of the concatenated epochs."""
        epochs, rows = [], []
        while count > 0:
            epoch, offset = divmod(start, self.samples)
            taken = min(count, self.samples - offset)
            rows.append(self._rows(epoch, offset, taken))
            epochs.append(np.full(taken, epoch, np.int64))
            start, count = start + taken, count - taken
        return np.concatenate(epochs), np.concatenate(rows)

    def _rows(self, epoch: int, offset: int, count: int) -> np.ndarray:
        """Manifest rows at offset .. offset + count of one epoch, frame after frame in the epoch's frame order."""
        order, ends = self._frame_order(epoch)
        first, last = np.searchsorted(ends, [offset, offset + count - 1], side="right")
        frames = order[first : last + 1]
        starts, lengths = self.manifest.frame_first[frames], self._frame_lengths()[frames]
        base = np.cumsum(lengths) - lengths
        rows = np.repeat(starts - base, lengths) + np.arange(lengths.sum())
        skip = offset - int(ends[first] - lengths[0])
        return rows[skip : skip + count]

    def _compute_frame_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's frames in order, and the cumulative count of samples at the end of each."""
        lengths = self._frame_lengths()
        order = keyed_order(self.seed, Purpose.FRAME_ORDER, epoch, np.arange(len(lengths)))
        return order, np.cumsum(lengths[order])

    def _frame_lengths(self) -> np.ndarray:
        return np.diff(self.manifest.frame_first)

    def _choose_views(self, epoch: np.ndarray, row: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """View and length of each image: where a crop exists, ``mixed`` takes it half the time."""
        lengths = self.manifest.size[row].astype(np.int64).prod(-1)  # (n, view)
        crop = lengths[:, CROP] > 0
        if self.views == "mixed":
            crop &= (words(self.seed, Purpose.VIEW, epoch, ids) & 1) == 1
        elif self.views == "resize":
            crop &= False
        view = np.where(crop, CROP, RESIZE)
        return view, np.take_along_axis(lengths, view[:, None], 1)[:, 0]


def deal_strata(tokens: np.ndarray, steps: int) -> np.ndarray:
    """The step (0 .. steps) of each image, equal counts and nearly equal token totals; len(tokens) % steps == 0."""
    strata = np.argsort(-tokens, kind="stable").reshape(-1, steps)
    total, step_of = np.zeros(steps, np.int64), np.empty(len(tokens), np.int64)
    for stratum in strata:
        poorest_first = np.argsort(total, kind="stable")
        step_of[stratum] = poorest_first
        total[poorest_first] += tokens[stratum]
    return step_of
