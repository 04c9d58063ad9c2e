"""The locks of publishing: one uploader for each run, one writer of an SQLite file on a shared file system, and one
process at a time that creates the tables of an SQLite file."""

import errno
import fcntl
import os
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from data_sharding.errors import UserError
from data_sharding.storage.failures import failure
from fitv2_scale.run.run import Run
from fitv2_scale.tracking.destination import shared_file_system, sqlite_path

# Lustre without -o flock, NFS without a lock daemon.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class RunLock:
    """The right to publish a run; free again when the process that holds it has exited.

    The lock of a run on S3 is local to the node. There, and on a file system without locks, two uploaders may hold it:
    they then send some points twice, with the same times, and MLflow's SQL stores drop the repeats.
    """

    def __init__(self, run: Run) -> None:
        """Raises UserError if the run's folder cannot be written."""
        path = run.local_path("tracking/lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab")  # noqa: SIM115 - __exit__ closes it
        except OSError as error:
            raise failure(str(path), error) from error

    def __enter__(self) -> "RunLock":
        return self

    def acquire(self) -> bool:
        """Takes the lock if it is free. True if this process holds it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no such locks here, or trouble with them: as if there were none
            return True
        return True

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextmanager
def writer_lock(uri: str, seconds: float) -> Generator[None]:
    """The right to write to the MLflow at ``uri``. A lock is taken only for an SQLite file on a shared file system;
    everything else has locks of its own.

    Raises:
        UserError: another process, on any node, holds the lock for longer than ``seconds``.
    """
    file = sqlite_path(uri)
    if file is None or not shared_file_system(file.parent):
        yield
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(f"{file}.writer", "a+")  # noqa: SIM115 - closed below
    except OSError as error:
        raise failure(f"{file}.writer", error) from error
    with lock:
        _wait_for_writer(lock, file, time.monotonic() + seconds)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        lock.flush()
        yield


def _wait_for_writer(lock: IO[str], file: Path, deadline: float) -> None:
    while (error := _try_lock(lock)) is not None:
        if error.errno in _NO_LOCKS:
            raise UserError(
                f"{file.parent} is on a shared file system without file locks: give another MLflow with --uri."
            ) from error
        if time.monotonic() > deadline:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise UserError(f"{file} is being written by {holder}: try again when that has finished.") from error
        time.sleep(0.1)


def _try_lock(lock: IO[str]) -> OSError | None:
    """Takes the lock, or returns the error that prevented it."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # POSIX: visible to all nodes, which flock's is not always
    except OSError as error:
        return error
    return None


@contextmanager
def tables_lock(uri: str) -> Generator[None]:
    """For the time in which MLflow may create the tables of an SQLite file: one process at a time, where the file
    system has locks. MLflow does not ensure this itself, and uploaders that start together, as those of a sweep do,
    would leave a file with half of its tables. No lock for other URIs."""
    file = sqlite_path(uri)
    if file is None:
        yield
        return
    with ExitStack() as stack:
        with suppress(OSError):  # without the lock, where there can be none: MLflow says what it cannot write
            file.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(f"{file}.lock", "w")), fcntl.LOCK_EX)
        yield
