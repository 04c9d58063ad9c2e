"""Tells a commit with a bad place on a disk, which is damaged, from an outage of the storage, which damages none."""

from collections.abc import Callable
from typing import TypeVar

from data_sharding.errors import BadPlace
from data_sharding.storage.bad_places import can_be_read
from fitv2_scale.checkpoint.checksums import Damaged
from fitv2_scale.run.log import LogEntry
from fitv2_scale.run.run import Run

Result = TypeVar("Result")


def finding_bad_places(run: Run, entry: LogEntry, act: Callable[[], Result]) -> Result:
    """``act()``, which reads a commit. Raises Damaged instead of BadPlace if all files of another commit of ``run`` can
    be read: without one there is nothing to fall back to, and nothing shows that the storage is sound."""
    try:
        return act()
    except BadPlace:
        if not _another_can_be_read(run, entry):
            raise
    try:
        return act()  # an outage may just have ended
    except BadPlace as error:
        if not _another_can_be_read(run, entry):  # or have begun
            raise
        raise Damaged(f"{error.__cause__}; other commits can be read") from error


def _another_can_be_read(run: Run, entry: LogEntry) -> bool:
    return any(_can_be_read(run, other) for other in reversed(run.log.commits()) if other.n != entry.n)


def _can_be_read(run: Run, entry: LogEntry) -> bool:
    files = run.store.list(f"{entry.fields['path']}/")
    return bool(files) and all(can_be_read(run.store.path(file), [0, -1]) for file in files)
