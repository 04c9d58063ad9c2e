"""Finds and deletes what killed attempts have left in a run's folder and no commit needs."""

from dataclasses import dataclass, field

from fitv2_scale.checkpoint.commit import attempt_of
from fitv2_scale.run.log import newest_attempt
from fitv2_scale.run.run import Attempt, Run


@dataclass(frozen=True)
class Leftovers:
    abandoned: list[str] = field(default_factory=list)  # folders of saves that were not committed
    retired: list[str] = field(default_factory=list)  # folders of retired commits, not deleted yet
    uploads: list[tuple[str, str]] = field(
        default_factory=list
    )  # (path, id) of multipart uploads that were not completed


def leftovers(run: Run) -> Leftovers:
    """Finds them and changes nothing.

    Only what was left by attempts that can no longer commit: those before the newest CLAIM, and the newest one after it
    has ended. Never what a running attempt writes, and never a commit, damaged or not.
    """
    entries = run.log.entries()
    newest = newest_attempt(entries)
    over = newest + (1 if newest and Attempt(newest, run).read_end() else 0)
    committed = {e.fields["path"] for e in run.log.commits()}
    named = {e.fields["path"] for e in entries if e.kind == "COMMIT"}
    folders = sorted({_folder(path) for path in run.store.list("steps/")} - committed)
    return Leftovers(
        abandoned=[f for f in folders if f not in named and _is_over(f, over)],
        retired=[f for f in folders if f in named],
        uploads=[(path, upload) for path, upload in run.store.uploads() if _is_over(_folder(path), over)],
    )


def remove(run: Run, found: Leftovers) -> None:
    """Deletes them. If it is interrupted, it can be run again."""
    for path, upload in found.uploads:
        run.store.abort_upload(path, upload)
    for folder in found.abandoned + found.retired:
        run.store.delete_tree(folder)


def _folder(path: str) -> str:
    """steps/00000010.0001/rank-00000.safetensors -> steps/00000010.0001"""
    return "/".join(path.split("/")[:2])


def _is_over(folder: str, over: int) -> bool:
    attempt = attempt_of(folder)
    return attempt is not None and attempt < over
