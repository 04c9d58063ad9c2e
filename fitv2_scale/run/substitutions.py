"""The ledger of a run: RUN/ledger/00000001.json …, one page a version (a sample: ``stream.substitutes``).

A page is written once, by conditional create, by rank 0 of the attempt that holds the newest CLAIM, before any rank
trains on a substitute. Pages are never changed, so a run that is started again finds the same substitutes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_sharding.errors import DataError
from data_sharding.storage.numbered_log import NumberedLog
from data_sharding.storage.store import Store
from data_sharding.stream.substitutes import Ledger, Loss
from fitv2_scale.run.log import RunLog, now, require_newest

log = logging.getLogger(__name__)

Page = dict[str, Any]


@dataclass
class RunLedger:
    """``ledger`` is the same on all ranks: every rank turns the pages that rank 0 hands out."""

    pages: NumberedLog[Page]
    log: RunLog
    attempt: int
    seed: int
    max_share: float  # of the images of all datasets that may be replaced
    ledger: Ledger

    def write(self, losses: Sequence[Loss], step: int) -> list[Page]:
        """On rank 0: puts ``losses``, which ``step`` met, into the ledger. Returns the pages to turn.

        Raises:
            DataError: more images would be replaced than allowed, or there is none to replace one.
            StaleAttempt: a newer attempt has claimed the run.
        """

        def build(before: Sequence[Page], nonce: str) -> Page | None:
            ledger = self.ledger
            for page in before[ledger.version :]:  # an older attempt's
                ledger = ledger.turned(page)
            new = [loss for loss in losses if (loss.dataset, loss.frame) not in ledger.frames]
            if not new:
                return None
            page = ledger.page(new, self.seed) | {"step": step, "nonce": nonce, "time": now()}
            self._check(ledger.turned(page), new)
            require_newest(self.attempt, self.log.entries())
            return page

        return self.pages.append(build)[self.ledger.version :]

    def turn(self, pages: Sequence[Page]) -> Ledger:
        for page in pages:
            self.ledger = self.ledger.turned(page)
            for frame in page["frames"]:
                log.warning("%d images are replaced: %s", len(frame["images"]), frame["cause"])
        return self.ledger

    def _check(self, ledger: Ledger, new: Sequence[Loss]) -> None:
        if ledger.share() > self.max_share:
            raise DataError(
                f"{ledger.images} images cannot be read, more than data.max_substituted = {self.max_share:g} allows to "
                f"replace: {new[0].cause}"
            )


def ledger_of(pages: Sequence[Page], manifests: Sequence) -> Ledger:
    ledger = Ledger(manifests)
    for page in pages:
        ledger = ledger.turned(page)
    return ledger


def page_log(store: Store) -> NumberedLog[Page]:
    """The pages of the ledger of the run in ``store``."""
    return NumberedLog(
        store, "ledger", _parse, suffix=".json", noun="page of the ledger", remedy="restore it from a backup."
    )


def summary(store: Store) -> dict[str, Any]:
    """For `fitv2 status`: {"version": 1, "frames": 1, "images": 64, "causes": ["s3://…: the shard is missing; …"]}"""
    pages = page_log(store).entries()
    frames = [frame for page in pages for frame in page["frames"]]
    images = sum(len(frame["images"]) for frame in frames)
    causes = [frame["cause"] for frame in frames]
    return {"version": len(pages), "frames": len(frames), "images": images, "causes": causes}


def _parse(version: int, page: Page) -> Page:
    if page["version"] != version or not isinstance(page["frames"], list) or not isinstance(page["nonce"], str):
        raise ValueError("it is another page")
    return page
