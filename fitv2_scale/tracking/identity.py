"""Which MLflow run a run folder has: its own, also after the folder was moved, but not that of a folder it was copied
from. Imports no mlflow.

    tracking/mlflow.json    {"uri": "sqlite:////runs/mlflow.db", "experiment": "fitv2", "mlflow_run": "8d0f…",
                             "run": "/runs/first", "name": "first-5f1c09ab", "attempt": 3}

``run`` is where the folder was when it was last published; ``name`` is the tag fitv2.run_id, and only in a copy not the
run's id; ``attempt`` was the newest when this place was taken. Versions up to a2e80d5 wrote none of the three.
"""

import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from data_sharding.errors import StorageDown, UserError
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.open_store import open_store
from data_sharding.storage.records import Count, Shape
from data_sharding.storage.store import Store
from fitv2_scale.run.log import newest_attempt
from fitv2_scale.run.run import Run

IDENTITY = "tracking/mlflow.json"


@dataclass(frozen=True)
class Published:
    """Where and as what a run has been published; empty fields if it has not."""

    uri: str = ""
    experiment: str = ""
    mlflow_run: str | None = None
    name: str = ""
    attempt: int = -1  # the newest when this place was taken; -1: not known
    moved_from: str = ""
    copied_from: str = ""  # the URL of the original; the other fields are then empty, since they are the original's


class _Place(Shape):
    uri: str = ""
    experiment: str = ""
    mlflow_run: str | None = None
    run: str = ""
    name: str = ""
    attempt: Count = 0


def place_of(store: Store) -> dict[str, Any]:
    """The record in a run's ``store``; {} if there is none. Raises DataError if it is damaged."""
    return store.read_json(IDENTITY, _Place, "remove it: its MLflow run is found again by the run's id") or {}


def published(run: Run) -> Published:
    """Raises DataError as ``place_of``; StorageDown if it cannot be told whether the run is a copy."""
    record = place_of(run.store)
    before = record.get("run") or str(run.config.get("run") or "")
    if _same_place(before, run.url):
        before = ""
    if before and _holds(before, run):
        return _copy(run, before)
    known: dict[str, Any] = {key: record[key] for key in ("uri", "experiment", "mlflow_run") if record.get(key)}
    known["attempt"] = record.get("attempt", -1)
    return Published(**known, name=record.get("name", run.id), moved_from=record.get("run", "") and before)


def unless_taken(run: Run, before: Published, place: str) -> Published:
    """``before``; but if the run was moved, and its MLflow run meanwhile is that of the folder ``place`` with the same
    run, it was copied first, and both copies moved: then it is a copy of that one. ``place`` is MLflow's tag."""
    if not before.moved_from or place in ("", before.moved_from) or _same_place(place, run.url):
        return before
    return _copy(run, place) if _holds(place, run) else before


def _copy(run: Run, original: str) -> Published:
    return Published(name=f"{run.id}-copy-{secrets.token_hex(4)}", copied_from=open_store(original).url)


def record(run: Run, uri: str, experiment: str, mlflow_run: str | None, name: str) -> None:
    """Remembers where the run is published, or None as long as the server has not answered. ``uri`` must hold no
    secrets."""
    place = {"uri": uri, "experiment": experiment, "mlflow_run": mlflow_run, "run": run.url, "name": name}
    run.store.put_json(IDENTITY, place | {"attempt": newest_attempt(run.log.entries())})


def _same_place(before: str, url: str) -> bool:
    """Whether both are one folder, perhaps under two names."""
    with suppress(UserError, OSError, ValueError):  # of a name that no file can have
        store = open_store(before) if before else None
        return store is None or store.url == url or (isinstance(store, LocalStore) and os.path.samefile(store.url, url))
    return False


def _holds(url: str, run: Run) -> bool:
    """Whether ``run`` also is at ``url``. A place that cannot be looked at, as on another machine, holds nothing."""
    try:
        return (open_store(url).read_json("run.json") or {}).get("id") == run.id
    except StorageDown:
        raise
    except (UserError, OSError, AttributeError, ValueError):
        return False
