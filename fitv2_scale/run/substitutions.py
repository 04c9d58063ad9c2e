"""The ledger of a run: RUN/ledger/00000001.json …, one page a version (a sample: ``stream.substitutes``).

A page is written once, by conditional create, by rank 0 of the attempt that holds the newest CLAIM, before any rank
trains on a substitute. Pages are never changed, so a run that is started again finds the same substitutes.
"""

import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_sharding.errors import DataError, StorageDown
from data_sharding.storage.store import Store
from data_sharding.stream.substitutes import Ledger, Loss
from fitv2_scale.run.log import RunLog, StaleAttempt, newest_attempt, now

log = logging.getLogger(__name__)


@dataclass
class RunLedger:
    """``ledger`` is the same on all ranks: every rank turns the pages that rank 0 hands out."""

    store: Store
    log: RunLog
    attempt: int
    seed: int
    max_share: float  # of the images of all datasets that may be replaced
    ledger: Ledger

    def write(self, losses: Sequence[Loss], step: int) -> list[dict[str, Any]]:
        """On rank 0: puts ``losses``, which ``step`` met, into the ledger. Returns the pages to turn.

        Raises:
            DataError: more images would be replaced than allowed, or there is none to replace one.
            StaleAttempt: a newer attempt has claimed the run.
        """
        nonce, pages, ledger = secrets.token_hex(8), [], self.ledger
        while True:
            while (page := _read(self.store, ledger.version + 1)) is not None:  # an older attempt's
                pages, ledger = [*pages, page], ledger.turned(page)
            new = [loss for loss in losses if (loss.dataset, loss.frame) not in ledger.frames]
            if not new:
                return pages
            page = ledger.page(new, self.seed) | {"step": step, "nonce": nonce, "time": now()}
            self._check(ledger.turned(page), new)
            if (newest := newest_attempt(self.log.entries())) != self.attempt:
                raise StaleAttempt(f"attempt {self.attempt} was superseded by attempt {newest}; it must stop")
            try:
                self.store.create(_path(page["version"]), json.dumps(page).encode())
            except (OSError, StorageDown):  # "exists", perhaps our own, its reply lost; what stands there decides
                if (found := _read(self.store, page["version"])) is None:
                    raise
                if found["nonce"] != nonce:
                    continue
            return [*pages, page]

    def turn(self, pages: Sequence[dict[str, Any]]) -> Ledger:
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


def ledger_of(pages: Sequence[dict[str, Any]], manifests: Sequence) -> Ledger:
    ledger = Ledger(manifests)
    for page in pages:
        ledger = ledger.turned(page)
    return ledger


def read_pages(store: Store) -> list[dict[str, Any]]:
    """The pages of a run's ledger, in order. Raises DataError if one is damaged."""
    pages: list[dict[str, Any]] = []
    while (page := _read(store, len(pages) + 1)) is not None:
        pages.append(page)
    return pages


def summary(store: Store) -> dict[str, Any]:
    """For `fitv2 status`: {"version": 1, "frames": 1, "images": 64, "causes": ["s3://…: the shard is missing; …"]}"""
    pages = read_pages(store)
    frames = [frame for page in pages for frame in page["frames"]]
    images = sum(len(frame["images"]) for frame in frames)
    causes = [frame["cause"] for frame in frames]
    return {"version": len(pages), "frames": len(frames), "images": images, "causes": causes}


def _path(version: int) -> str:
    return f"ledger/{version:08d}.json"


def _read(store: Store, version: int) -> dict[str, Any] | None:
    try:
        page = json.loads(store.read(_path(version)))
        if page["version"] != version or not isinstance(page["frames"], list) or not isinstance(page["nonce"], str):
            raise ValueError("it is another page")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{store.path(_path(version))} is not a page of the ledger ({error}): restore it") from error
    return page
