"""The images of each step: a pure function of (datasets, seed, schedule), independent of ranks and capacity.

An epoch of a dataset is a random permutation of its frames; epochs are concatenated, so no image is dropped and no step
is short at the end of an epoch. A schedule of segments sets, from which step on, how many images a step has and which
fraction of them comes from which dataset. A segment is cut into windows of ``window_steps`` steps, and ``stratify``
assigns a window's images to its steps: all steps hold nearly equal token totals, the same spread of lengths, and the
same number of images of each part of the window, so that a node can take the same frames' images in every step. A
random shuffle of the steps leaves no trend over time.

Everything is integer arithmetic on counter-based random numbers, with stable sorts: the plan is the same on any machine
and with any NumPy. A change of this file that changes the plan must raise PLANNER_VERSION (a golden digest in the tests
watches it).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_sharding.errors import UserError
from data_sharding.format.manifest import Manifest
from data_sharding.plan.stratify import assign_to_steps, order_frames
from data_sharding.plan.token_grid import STORED_TOKENS, TokenGrid
from data_sharding.plan.view_choice import Views
from data_sharding.plan.view_sizes import choose_views
from data_sharding.rng import Purpose, keyed_order, words, words64

PLANNER_VERSION = 2
MAX_WINDOW_STEPS = 256


@dataclass(frozen=True)
class StepSet:
    """The B images of one step, in the order of their frames in the window; every array is int64 (B,)."""

    dataset: np.ndarray  # index into Plan.manifests
    epoch: np.ndarray  # of that dataset
    row: np.ndarray  # row of its manifest
    sample_id: np.ndarray  # unique over all datasets of the plan
    label: np.ndarray
    view: np.ndarray  # RESIZE or CROP of view_sizes
    flip: np.ndarray  # 1 = mirrored
    tokens: np.ndarray  # length of the chosen view, in tokens of the network

    def select(self, which: np.ndarray) -> "StepSet":
        """The images at the indices ``which``, in that order."""
        return StepSet(*(column[which] for column in vars(self).values()))

    def id_sum(self, part: np.ndarray | slice) -> int:
        """Sum of the hashed (epoch, id) of some images, modulo 2**64, signed: sums of parts add up."""
        hashed = words64(0, Purpose.DATA_ID, self.epoch[part], self.sample_id[part])
        return int(hashed.sum(dtype=np.uint64).astype(np.int64))


@dataclass(frozen=True)
class Segment:
    """From step ``start`` on, each step has ``images`` images, drawn from the datasets in proportion to ``weights``."""

    start: int
    images: int
    weights: tuple[int, ...]


@dataclass(frozen=True)
class Cursor:
    """The position of a run in its data: all loader state that a checkpoint holds. As JSON:

    {"plan_hash": "77e1…", "ledger": 0, "schedule": [[0, 256, [1]]], "epoch": [3], "window": 61, "images": [4000000]}
    """

    plan_hash: str
    ledger: int  # records of substituted images so far (RUN/ledger)
    schedule: list[list]  # the segments so far
    epoch: list[int]  # of each dataset
    window: int  # of the current segment
    images: list[int]  # consumed from each dataset since the run began


class Plan:
    """The plan of ``manifests`` under ``schedule``, whose first segment starts at 0. ``token_grid`` changes the lengths
    of its images and nothing else.

    Raises:
        UserError: a batch larger than the data, or weights that do not fit the datasets.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        seed: int,
        views: Views,
        schedule: Sequence[Segment],
        token_grid: TokenGrid = STORED_TOKENS,
    ):
        assert schedule[0].start == 0 and all(a.start < b.start for a, b in zip(schedule, schedule[1:], strict=False))
        self.manifests, self.seed, self.views, self.schedule = tuple(manifests), seed, views, tuple(schedule)
        self.token_grid = token_grid
        self.samples = [len(m.sample_id) for m in self.manifests]
        for segment in self.schedule:
            self._check(segment)
        self._frame_order = lru_cache(maxsize=4)(self._compute_frame_order)
        self._window = lru_cache(maxsize=2)(self._compute_window)

    def _check(self, segment: Segment) -> None:
        if not 1 <= segment.images <= sum(self.samples):
            raise UserError(
                f"batch.images is {segment.images}, but {self.manifests[0].url} holds {sum(self.samples)} images: "
                "choose a batch between 1 and that number"
            )
        if len(segment.weights) != len(self.manifests) or min(segment.weights) < 0 or sum(segment.weights) == 0:
            raise UserError(
                f"data.weights are {list(segment.weights)}: give one for each of the {len(self.manifests)} datasets, "
                "none below 0 and not all 0"
            )

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest view that the plan may choose."""
        return self.token_grid.longest(max(m.header.max_tokens for m in self.manifests))

    @property
    def hash(self) -> str:
        """Identifies the order of every dataset; batch and weights, which a schedule may change, are in the cursor."""
        fields = {
            "planner": PLANNER_VERSION,
            "seed": self.seed,
            "datasets": [m.digest for m in self.manifests],
            "views": self.views,
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def segment_at(self, step: int) -> int:
        """Index of the segment that step ``step`` belongs to."""
        return max(i for i, segment in enumerate(self.schedule) if segment.start <= step)

    def window_steps(self, segment: int) -> int:
        """Steps of a full window: at most an epoch, else a small dataset would mix images of several epochs."""
        return max(1, min(MAX_WINDOW_STEPS, sum(self.samples) // self.schedule[segment].images))

    def window_of(self, step: int) -> tuple[int, int, int]:
        """(index of the segment, of the window in it, of the step in the window)."""
        segment = self.segment_at(step)
        return segment, *divmod(step - self.schedule[segment].start, self.window_steps(segment))

    def window_length(self, step: int) -> int:
        """Steps of the window that ``step`` lies in: the last one before a change of schedule may be shorter."""
        segment, _, place = self.window_of(step)
        length = self.window_steps(segment)
        if segment + 1 < len(self.schedule):
            length = min(length, self.schedule[segment + 1].start - (step - place))
        return length

    def next_boundary(self, step: int) -> int:
        """The first window boundary at or after ``step``: where a change of schedule may begin."""
        segment, _, place = self.window_of(step)
        return step if place == 0 else step - place + self.window_steps(segment)

    def step(self, step: int) -> StepSet:
        """The images of step ``step``, counted from 0."""
        segment, window, place = self.window_of(step)
        return self._window(segment, window)[place]

    def lengths(self, segment: int, window: int) -> np.ndarray:
        """Tokens of the images of each step of a window, without the steps themselves: int64 (steps, B)."""
        images, where = self._assign_window(segment, window)
        return images.tokens[where]

    def total_images(self, step: int) -> int:
        """Images that the first ``step`` steps train on, from all datasets together."""
        segment, window, place = self.window_of(step)
        steps = window * self.window_steps(segment) + place
        return int(self._taken(segment, steps).sum())

    def consumed(self, step: int) -> list[int]:
        """Images that the first ``step`` steps take from each dataset."""
        segment, window, place = self.window_of(step)
        before = self._taken(segment, window * self.window_steps(segment))
        inside = np.zeros(len(self.manifests), np.int64)
        for k in range(place):
            inside += np.bincount(self._window(segment, window)[k].dataset, minlength=len(inside))
        return (before + inside).tolist()

    def continued(self, cursor: Cursor, step: int, wanted: Segment) -> "Plan":
        """The plan of a run that is at ``cursor`` after ``step`` steps and continues with the batch and weights of
        ``wanted``.

        A change of batch or weights begins at the next window boundary, so that nothing is lost or repeated.
        """
        past = tuple(Segment(start, images, tuple(weights)) for start, images, weights in cursor.schedule)
        plan = self.under(past)
        if (past[-1].images, past[-1].weights) == (wanted.images, wanted.weights):
            return plan
        boundary = plan.next_boundary(step)
        kept = tuple(segment for segment in past if segment.start < boundary)
        return self.under((*kept, Segment(boundary, wanted.images, wanted.weights)))

    def under(self, schedule: Sequence[Segment]) -> "Plan":
        """The plan of the same data under another schedule."""
        return Plan(self.manifests, self.seed, self.views, schedule, self.token_grid)

    def cursor(self, step: int, ledger: int = 0) -> Cursor:
        """The state after ``step`` steps, with the first ``ledger`` records of substituted images in use."""
        segment, window, _ = self.window_of(step)
        images = self.consumed(step)
        schedule = [[s.start, s.images, list(s.weights)] for s in self.schedule[: segment + 1]]
        epoch = [taken // samples for taken, samples in zip(images, self.samples, strict=True)]
        return Cursor(self.hash, ledger, schedule, epoch, window, images)

    def _taken(self, segment: int, steps: int) -> np.ndarray:
        """Images taken from each dataset before the first ``steps`` steps of a segment have ended: int64 (datasets,).

        Of the images that no earlier dataset gave, each dataset gives its fraction, rounded down: every image comes
        from some dataset, no count decreases as steps grow, and any number of steps can be computed directly.
        """
        taken = np.zeros(len(self.manifests), np.int64)
        for i in range(segment + 1):
            current = self.schedule[i]
            length = steps if i == segment else self.schedule[i + 1].start - current.start
            left, weight_left = length * current.images, sum(current.weights)
            for d, weight in enumerate(current.weights):
                given = left * weight // weight_left if weight_left else 0
                taken[d] += given
                left, weight_left = left - given, weight_left - weight
        return taken

    def _compute_window(self, segment: int, window: int) -> list[StepSet]:
        images, where = self._assign_window(segment, window)
        return [StepSet(*step) for step in zip(*(column[where] for column in vars(images).values()), strict=True)]

    def _assign_window(self, segment: int, window: int) -> tuple[StepSet, np.ndarray]:
        """A window's images, and the indices of each step's: int64 (steps, images of a step)."""
        current, first = self.schedule[segment], window * self.window_steps(segment)
        steps = self.window_length(current.start + first)
        start, stop = self._taken(segment, first), self._taken(segment, first + steps)
        streams = [self._stream(d, int(start[d]), int(stop[d] - start[d])) for d in range(len(self.manifests))]
        # Stored lengths: what a step trains on does not depend on the network's patch.
        *columns, stored = (np.concatenate(column) for column in zip(*streams, strict=True))
        images = StepSet(*columns)
        order = order_frames(self._frame_starts(images), stored)
        draws = words64(self.seed, Purpose.SAMPLE_ORDER, images.epoch, images.sample_id)
        by_step = assign_to_steps(stored[order], draws[order], steps)
        places = current.start + first + np.arange(steps)
        shuffled = keyed_order(self.seed, Purpose.STEP_ORDER, 0, places)
        return images, order[by_step[shuffled]]

    def _frame_starts(self, images: StepSet) -> np.ndarray:
        """Indices into ``images`` (frame after frame) at which a new frame or epoch begins; the first is 0."""
        frame = np.empty_like(images.row)
        for d, manifest in enumerate(self.manifests):
            mine = images.dataset == d
            frame[mine] = np.searchsorted(manifest.frame_first, images.row[mine], side="right")
        dataset, epoch, frame = (np.diff(column, prepend=-1) != 0 for column in (images.dataset, images.epoch, frame))
        return np.flatnonzero(dataset | epoch | frame)

    def _stream(self, d: int, start: int, count: int) -> tuple[np.ndarray, ...]:
        """The columns of StepSet, and stored lengths, for positions start .. start + count of the concatenated epochs
        of dataset ``d``."""
        epochs, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while count > 0:
            epoch, offset = divmod(start, self.samples[d])
            taken = min(count, self.samples[d] - offset)
            rows.append(self._rows(d, epoch, offset, taken))
            epochs.append(np.full(taken, epoch, np.int64))
            start, count = start + taken, count - taken
        epoch, row = np.concatenate(epochs), np.concatenate(rows)
        manifest = self.manifests[d]
        ids = sample_ids(d, manifest.sample_id[row])
        view, size = choose_views(manifest, self.views, self.seed, epoch, row, ids)
        flip = (words(self.seed, Purpose.FLIP, epoch, ids) & 1).astype(np.int64)
        label, tokens = manifest.label[row].astype(np.int64), self.token_grid.lengths(size)
        return np.full_like(row, d), epoch, row, ids, label, view, flip, tokens, size.prod(-1)

    def _rows(self, d: int, epoch: int, offset: int, count: int) -> np.ndarray:
        """Manifest rows at offset .. offset + count of one epoch, frame after frame in the epoch's frame order."""
        order, ends = self._frame_order(d, epoch)
        first, last = np.searchsorted(ends, [offset, offset + count - 1], side="right")
        frames = order[first : last + 1]
        starts = self.manifests[d].frame_first[frames]
        lengths = self.manifests[d].frame_first[frames + 1] - starts
        base = np.cumsum(lengths) - lengths
        rows = np.repeat(starts - base, lengths) + np.arange(lengths.sum())
        skip = offset - int(ends[first] - lengths[0])
        return rows[skip : skip + count]

    def _compute_frame_order(self, d: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's frames in order, and the cumulative count of samples at the end of each."""
        lengths = np.diff(self.manifests[d].frame_first)
        order = keyed_order(self.seed, Purpose.FRAME_ORDER, epoch, (d << 40) + np.arange(len(lengths)))
        return order, np.cumsum(lengths[order])


def sample_ids(dataset: int, ids: np.ndarray) -> np.ndarray:
    """Ids that are unique over datasets: the same picture may be in several of them, with the same id."""
    offset = (dataset * 0x9E3779B97F4A7C15) & 0x7FFFFFFFFFFFFFFF
    return np.asarray(ids, np.int64) ^ np.int64(offset)
