"""Who may publish: one process at a time for each run, and one for an SQLite file on a shared file system."""

import errno
import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from data_sharding.errors import UserError
from fitv2_scale.run.run import Run
from fitv2_scale.tracking.destination import database, shared_file_system

# Lustre without -o flock, NFS without a lock daemon.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class Lock:
    """The right to publish a run; free again when the process that holds it is gone.

    The lock of a run on S3 is the node's. There, and on a file system without locks, two may hold it: they then send
    some points twice, with the same times, which MLflow's SQL stores drop.
    """

    def __init__(self, run: Run) -> None:
        self._path = run.local("tracking/lock")

    def __enter__(self) -> "Lock":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "ab")
        return self

    def held(self) -> bool:
        """Takes the lock if it is free; True if it is ours."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        return True

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Writer:
    """The right to write to the MLflow at ``uri``. Raises UserError if it is an SQLite file on a shared file system
    that another process, on any node, writes to for longer than ``seconds``. All else has locks of its own."""

    def __init__(self, uri: str, seconds: float) -> None:
        file, self._seconds = database(uri), seconds
        self._path = Path(f"{file}.writer") if file and shared_file_system(file.parent) else None

    def __enter__(self) -> "Writer":
        if self._path is None:
            return self
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "a+")
        deadline = time.monotonic() + self._seconds
        while (error := self._refusal()) is not None:
            if error.errno in _NO_LOCKS:
                why = f"{self._path.parent} is on a shared file system without locks: give another MLflow as --uri."
            elif time.monotonic() > deadline:
                self._file.seek(0)
                holder = self._file.read().strip() or "another process"
                why = f"{holder} writes to {self._path.with_suffix('')}; try again when it is done."
            else:
                time.sleep(0.1)
                continue
            self._file.close()
            raise UserError(why) from error
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}")
        self._file.flush()
        return self

    def _refusal(self) -> OSError | None:
        """Takes the lock; why it could not, if it could not."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # POSIX: all nodes see it, not always so flock's
        except OSError as error:
            return error
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._path is not None:
            self._file.close()
