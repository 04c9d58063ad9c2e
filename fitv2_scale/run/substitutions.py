"""A run's records of substituted images: RUN/ledger/00000001.json … (a sample in ``data_sharding.stream.substitutes``).

A record is written once, by conditional create, by rank 0 of the attempt that holds the newest CLAIM, before any rank
trains on a substitute. Records never change, so a run that is started again finds the same substitutes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_sharding.errors import DataError
from data_sharding.plan.token_grid import STORED_TOKENS, TokenGrid
from data_sharding.storage.numbered_log import NumberedLog
from data_sharding.storage.records import Count, Shape
from data_sharding.storage.store import Store
from data_sharding.stream.substitutes import LostFrame, Substitutes
from fitv2_scale.run.log import RunLog, now, require_newest

log = logging.getLogger(__name__)

Record = dict[str, Any]


class _Frame(Shape):
    dataset: str
    frame: Count
    cause: str
    images: list[list[Count | None]]  # the planned id, then the row to read instead for each view


class _Record(Shape):
    version: Count
    frames: list[_Frame]
    nonce: str


@dataclass
class SubstitutionLog:
    """``substitutes`` are the same on all ranks: each applies the records that rank 0 broadcasts."""

    records: NumberedLog[Record]
    log: RunLog
    attempt: int
    seed: int
    max_fraction: float  # of the images of all datasets that may be replaced
    substitutes: Substitutes

    def write(self, lost_frames: Sequence[LostFrame], step: int) -> list[Record]:
        """On rank 0: records substitutes for the ``lost_frames`` that were found at ``step``. Returns the records to
        apply, which may include some of an older attempt.

        Raises:
            DataError: more images would be replaced than allowed, or no image can replace one of them.
            StaleAttempt: a newer attempt has claimed the run.
        """

        def build(before: Sequence[Record], nonce: str) -> Record | None:
            substitutes = self.substitutes
            for record in before[substitutes.version :]:  # an older attempt's
                substitutes = substitutes.with_record(record)
            new = [lost for lost in lost_frames if (lost.dataset, lost.frame) not in substitutes.frames]
            if not new:
                return None
            record = substitutes.next_record(new, self.seed) | {"step": step, "nonce": nonce, "time": now()}
            self._check(substitutes.with_record(record), new)
            require_newest(self.attempt, self.log.entries())
            return record

        return self.records.append(build)[self.substitutes.version :]

    def apply(self, records: Sequence[Record]) -> Substitutes:
        """The substitutes with ``records`` added; each replaced frame is logged."""
        for record in records:
            self.substitutes = self.substitutes.with_record(record)
            for frame in record["frames"]:
                log.warning("%d images are replaced: %s", len(frame["images"]), frame["cause"])
        return self.substitutes

    def _check(self, substitutes: Substitutes, new: Sequence[LostFrame]) -> None:
        if substitutes.fraction() > self.max_fraction:
            raise DataError(
                f"{substitutes.images} images cannot be read, more than data.max_substituted = {self.max_fraction:g} "
                f"allows to replace: {new[0].cause}"
            )


def substitutes_of(
    records: Sequence[Record], manifests: Sequence, token_grid: TokenGrid = STORED_TOKENS
) -> Substitutes:
    """The substitutes that ``records`` describe, for the datasets of ``manifests``."""
    substitutes = Substitutes(manifests, token_grid)
    for record in records:
        substitutes = substitutes.with_record(record)
    return substitutes


def substitution_records(store: Store) -> NumberedLog[Record]:
    """The records of the run in ``store``."""
    return NumberedLog(
        store, "ledger", _parse, suffix=".json", noun="record of substituted images", remedy="restore it from a backup."
    )


def summary(store: Store) -> dict[str, Any]:
    """For `fitv2 status`: {"version": 1, "frames": 1, "images": 64, "causes": ["s3://…: the shard is missing; …"]}"""
    records = substitution_records(store).entries()
    frames = [frame for record in records for frame in record["frames"]]
    images = sum(len(frame["images"]) for frame in frames)
    causes = [frame["cause"] for frame in frames]
    return {"version": len(records), "frames": len(frames), "images": images, "causes": causes}


def _parse(version: int, record: Record) -> Record:
    if _Record.check(record)["version"] != version:
        raise ValueError(f"it says version={record['version']}")
    return record
