"""Attempts that write journals and commit without training anything."""

import time
from pathlib import Path

from fitv2_scale.run.run import Attempt, Run
from fitv2_scale.tracking import journal
from fitv2_scale.tracking.journal import Journal, Position

DIGEST = "sha256:00"


def make(folder: Path, config: dict | None = None) -> Run:
    return Run.open_or_create(str(folder), config or {"model": {"dim": 8}}, {}, "plan")


def train(run: Run, start: int, until: int, commits: tuple[int, ...] = (), seal: bool = True) -> Attempt:
    """An attempt that records a loss at each step of (start, until], equal to attempt + step/1000."""
    attempt = run.claim({})
    log = Journal(attempt.folder, attempt.number, start)
    for step in range(start + 1, until + 1):
        log.metrics(step, {"loss": attempt.number + step / 1000})
        if step in commits:
            time.sleep(0.002)  # what comes before and behind it differs in its millisecond, as in real runs
            log.seal()
            attempt.commit(step, f"steps/{step}", DIGEST)
            time.sleep(0.002)
    if seal:
        log.seal()
    return attempt


def curve(run: Run, after: Position = Position()) -> list[tuple[int, int]]:  # noqa: B008
    """(step, attempt that measured it), read back from the losses."""
    return [(r.step, int(r.metrics["loss"])) for r in journal.read(run, after)]
