"""Creates the identity of a run, run.json, in a new folder that holds nothing else."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from data_sharding.errors import UserError
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.store import Store

IDENTITY = "run.json"
_OF_A_RUN = {IDENTITY, "log", "attempts", "steps", "ledger", "tracking", "chain"}


def create_identity(store: Store, identity: dict[str, Any]) -> None:
    """Raises FileExistsError if there is one, UserError if two attempts could both commit on this storage."""
    store.create_json(IDENTITY, identity, indent=1)
    with suppress(FileExistsError):  # the same bytes again
        store.create_json(IDENTITY, identity, indent=1)
        raise UserError(
            f"{store.url}: a conditional create overwrites an existing object on this storage (versioned buckets of "
            "some servers do that); put the run into another bucket."
        )


def refuse_foreign_folder(store: Store) -> None:
    """Raises UserError if the local folder holds files, but nothing of a run: such as photographs, or a dataset."""
    if isinstance(store, LocalStore) and Path(store.url).is_dir():
        found = (path.name for path in Path(store.url).iterdir())
        names = sorted(name for name in found if not name.startswith((".", "doctor-")))  # of a killed `fitv2 doctor`
        if names and not _OF_A_RUN & set(names):
            raise UserError(
                f"{store.url} is no run, but holds {len(names)} other files or folders ({', '.join(names[:3])}"
                f"{', …' if len(names) > 3 else ''}): give a new or empty folder as run=FOLDER"
            )
