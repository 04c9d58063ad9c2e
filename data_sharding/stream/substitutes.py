"""Which images replace those of a frame that cannot be read.

A substitute has the planned image's token length, in the same view (else the nearest shorter one), so packs, costs and
all other images stay as planned. It keeps the planned image's id, epoch and flip, hence its noise and time, and brings
its own latents and label. "Exactly once" counts planned ids.

Records are only ever added: version v is the first v of them. A record is a JSON object, stored by a run as
RUN/ledger/00000001.json … (``fitv2_scale/run/substitutions.py``):

    {"version": 1, "step": 812, "nonce": "9f0c…", "time": "…", "frames": [
        {"dataset": "5f0c…", "shard": "shard-000003.tar.zst", "frame": 211, "cause": "s3://…: the shard is missing; …",
         "images": [[55065209174414567, 90211, 1207], [7124091, 412, null]]}]}

``dataset`` is the digest of its manifest. ``images`` are those of the frame, in order: id, and the manifest rows that
replace its resize and its crop view (null: the image has no such view).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data_sharding.errors import DataError
from data_sharding.format.manifest import Manifest
from data_sharding.plan.token_grid import STORED_TOKENS, TokenGrid
from data_sharding.plan.view_sizes import CROP, RESIZE
from data_sharding.rng import Purpose, words64

_DRAWS = 4096  # candidates drawn before the whole dataset is searched
_BLOCK = 1 << 20  # rows compared at once in that search


@dataclass(frozen=True, order=True)
class LostFrame:
    """A frame that a rank could not read."""

    dataset: int  # index into Plan.manifests
    frame: int
    cause: str = field(compare=False)


@dataclass(frozen=True)
class Substitutes:
    """The substitutes of all records so far, for the datasets of a plan."""

    manifests: Sequence[Manifest]
    token_grid: TokenGrid = STORED_TOKENS  # of the network: its tokens are what a length counts
    version: int = 0
    # (dataset, frame): int64 (images, view), the manifest rows that replace its images; -1: no such view
    frames: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Images that are replaced."""
        return sum(len(rows) for rows in self.frames.values())

    def fraction(self) -> float:
        """Images that are replaced, as a fraction of all images of the datasets."""
        return self.images / sum(len(m.sample_id) for m in self.manifests)

    def with_record(self, record: dict) -> "Substitutes":
        """With one more record. A frame is replaced wherever its dataset is listed: one given twice, and a copy of it,
        have the same digest. Frames of datasets that are not read here change nothing but the version.

        Raises DataError if it is not the next record.
        """
        if record["version"] != self.version + 1:
            raise DataError(
                f"of the run's records of substituted images, number {self.version + 1} is missing before number "
                f"{record['version']}: restore the folder ledger of the run"
            )
        added = {
            (dataset, f["frame"]): np.array(
                [[-1 if row is None else row for row in image[1:]] for image in f["images"]], np.int64
            )
            for f in record["frames"]
            for dataset, m in enumerate(self.manifests)
            if m.digest == f["dataset"]
        }
        return replace(self, version=record["version"], frames=self.frames | added)

    def next_record(self, lost_frames: Iterable[LostFrame], seed: int) -> dict:
        """``version`` and ``frames`` of the next record, for those of ``lost_frames`` that have no substitutes yet.

        A pure function of (these substitutes, seed, the frames in any order). Raises DataError if no image can replace
        one of theirs.
        """
        first = {
            m.digest: i for i, m in reversed(list(enumerate(self.manifests)))
        }  # where each dataset is listed first
        new = {(first[self.manifests[f.dataset].digest], f.frame): f.cause for f in sorted(lost_frames, reverse=True)}
        new = {frame: cause for frame, cause in sorted(new.items()) if frame not in self.frames}
        lost = self.frames.keys() | new.keys()
        return {
            "version": self.version + 1,
            "frames": [
                {
                    "dataset": (m := self.manifests[dataset]).digest,
                    "shard": m.shards[m.frame_shard[frame]].name,
                    "frame": frame,
                    "cause": cause,
                    "images": list(_Search(m, {f for d, f in lost if d == dataset}, seed, self.token_grid).of(frame)),
                }
                for (dataset, frame), cause in new.items()
            ],
        }

    def is_lost(self, dataset: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Whether each image needs a substitute: bool, of the arguments' shape."""
        lost = np.zeros(row.shape, bool)
        for d, f in self.frames:
            first, end = self.manifests[d].frame_first[f : f + 2]
            lost |= (dataset == d) & (first <= row) & (row < end)
        return lost

    def row(self, dataset: int, row: int, view: int) -> int:
        """The row to read for a planned one: itself, or its substitute, or the substitute's substitute, and so on."""
        m = self.manifests[dataset]
        while (dataset, f := frame_of(m, row)) in self.frames:
            row = int(self.frames[dataset, f][row - int(m.frame_first[f]), view])
        return row


def frame_of(manifest: Manifest, row: int) -> int:
    """The frame that a row of the manifest lies in."""
    return int(frames_of(manifest, np.array(row)))


def frames_of(manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """The frame that each row lies in."""
    return np.searchsorted(manifest.frame_first, rows, side="right") - 1


@dataclass(frozen=True)
class _Search:
    """Looks for substitutes in the frames of one dataset that are not ``lost``."""

    manifest: Manifest
    lost: set[int]
    seed: int
    token_grid: TokenGrid

    def of(self, frame: int) -> Iterator[list[int | None]]:
        """For each image of ``frame`` its id, and the rows that replace its views."""
        m = self.manifest
        for row in range(*m.frame_first[frame : frame + 2].tolist()):
            yield [int(m.sample_id[row]), *(self._substitute(row, view) for view in (RESIZE, CROP))]

    def _substitute(self, row: int, view: int) -> int | None:
        """A row of equal length, drawn at random by (seed, planned id, view) from all readable ones; None for a view
        that the image does not have."""
        m = self.manifest
        length = int(self._lengths(np.array([row]), view)[0])
        if length == 0:
            return None
        key = np.arange(_DRAWS, dtype=np.uint64) << np.uint64(1) | np.uint64(view)
        draws = words64(self.seed, Purpose.SUBSTITUTE, key, int(m.sample_id[row]))
        rows = (draws % np.uint64(len(m.sample_id))).astype(np.int64)
        equal = rows[self._lengths(rows, view) == length]
        for found in equal.tolist():
            if frame_of(m, found) not in self.lost:
                return found
        return self._from_all(length, view, int(draws[0]), f"{m.sample_id[row]:016x}")

    def _from_all(self, length: int, view: int, draw: int, name: str) -> int:
        """As ``_substitute``, from the whole dataset: for lengths so rare that no draw found one."""
        best, rows, m = 0, [], self.manifest
        for start in range(0, len(m.sample_id), _BLOCK):
            block = np.arange(start, min(start + _BLOCK, len(m.sample_id)))
            lengths = self._lengths(block, view)
            lengths[lengths > length] = 0
            for f in self.lost:
                first, end = m.frame_first[f : f + 2]
                lengths[(first <= block) & (block < end)] = 0
            longest = int(lengths.max(initial=0))
            if longest > best:
                best, rows = longest, []
            if longest == best > 0:
                rows += block[lengths == best].tolist()
        if not rows:
            raise DataError(
                f"{m.url}: image {name} cannot be read, and no readable image is short enough to replace it: restore "
                "its shard from a copy"
            )
        return rows[draw % len(rows)]

    def _lengths(self, rows: np.ndarray, view: int) -> np.ndarray:
        return self.token_grid.lengths(self.manifest.size[rows, view])
