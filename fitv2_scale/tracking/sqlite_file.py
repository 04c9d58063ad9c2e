"""An SQLite file as MLflow's store: its tables are made by whoever comes first, and MLflow does not see to it that this
is one alone. Uploaders that begin together, as those of a sweep do, would leave it half made for ever."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "sqlite:///"


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """One process at a time, if ``uri`` is an SQLite file: by a lock on a file beside it, where the disk has locks."""
    if not uri.startswith(_PREFIX):
        yield
        return
    file = Path(uri.removeprefix(_PREFIX).partition("?")[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{file}.lock", "w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
