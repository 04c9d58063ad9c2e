"""A node's cache of compressed frames on its own disk, shared by all its ranks, and by runs on the same data.

    CACHE/3f/3f09…c2.frame    a whole frame, named by its digest; created by rename, last used at its mtime
    CACHE/3f/3f09…c2.tmp      the frame while the holder of …
    CACHE/3f/3f09…c2.lock     … this lock writes it; others that need the frame wait for the lock
    CACHE/usage               bytes of all frames, or more; also the lock for changing them

A fault of the cache stops nothing: after any error of the disk, frames are fetched without it. Locks are flock(2),
which the kernel releases when a process is killed, so no leftover can block; and each frame that is read is compared
with its digest, so a damaged one is only a miss. A frame may be evicted while it is read: the reader has the file open,
and the next reader fetches it again.

Bound: ``max_bytes`` counts frames; eviction removes the least recently used ones until a tenth is free. The bytes of a
writer that is killed between counting and renaming stay counted until the next eviction, which counts again.
"""

import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_sharding.storage.atomic_write import temporary_file
from data_sharding.storage.filesystems import Cancelled
from data_sharding.storage.retry import CorruptRead, RetryPolicy

_NAME = re.compile(r"[0-9a-f]{32}\.(frame|tmp|lock)")
_FREE = 0.1  # fraction of the cache that an eviction frees
_USAGE_WAIT = 10.0  # seconds to wait for the lock on the usage, then store nothing

log = logging.getLogger(__name__)


class DiskCache:
    """A cache in ``folder`` of at most ``max_bytes``. Safe for any number of threads and processes on one machine."""

    def __init__(self, folder: str, max_bytes: int):
        self.folder, self.max_bytes = Path(folder).expanduser().absolute(), max_bytes
        self._warned = False

    def get(
        self, digest: str, *, check: Callable[[bytes], None], fetch: Callable[[], bytes], policy: RetryPolicy
    ) -> bytes:
        """The frame with this digest; on a miss one rank calls ``fetch`` while the others wait.

        A rank that waits longer than three attempts may take fetches by itself, in case the fetching process hangs.
        ``check`` raises CorruptRead if the bytes are wrong. Raises what ``fetch`` raises, and Cancelled.
        """
        if (data := self._read(digest, check)) is not None:
            return data
        with self._frame_lock(digest, 3 * policy.attempt, policy) as mine:
            if not mine:
                return fetch()
            if (data := self._read(digest, check)) is None:
                data = fetch()
                self._store(digest, data)
            return data

    def _path(self, digest: str, kind: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.{kind}"

    def _read(self, digest: str, check: Callable[[bytes], None]) -> bytes | None:
        path = self._path(digest, "frame")
        try:
            data = path.read_bytes()
            check(data)
            os.utime(path)
        except FileNotFoundError:
            return None
        except CorruptRead:
            with suppress(OSError):
                path.unlink()
            return None
        except OSError as error:
            self._warn(error)
            return None
        return data

    def _store(self, digest: str, data: bytes) -> None:
        """Needs the frame's lock. The rename, too, is under the lock of the usage: so an eviction, which counts the
        frames that exist, misses none."""
        path, size = self._path(digest, "frame"), len(data)
        if size > self.max_bytes:
            return
        try:
            with temporary_file(path, self._path(digest, "tmp")) as (file, temporary):
                file.write(data)
                file.flush()
                with _locked(self.folder / "usage", _USAGE_WAIT, None) as usage:
                    if usage is not None and self._count(usage, size):
                        os.replace(temporary, path)
        except OSError as error:
            self._warn(error)

    def _count(self, usage: int, size: int) -> bool:
        """Adds ``size`` bytes to the usage, after an eviction if there is no room. False if there is none even then."""
        text = os.pread(usage, 32, 0)
        used = int(text) if text.strip().isdigit() else self._evict(self.max_bytes)
        if used + size > self.max_bytes:
            used = self._evict(int((1 - _FREE) * self.max_bytes) - size)
        if used + size > self.max_bytes:
            return False
        os.pwrite(usage, b"%020d\n" % (used + size), 0)
        return True

    def _evict(self, keep: int) -> int:
        """Removes the leftovers of killed writers, and frames, the least recently used first, until at most ``keep``
        bytes of frames are left. Returns their bytes."""
        frames, total = [], 0
        for entry in self._entries():
            with suppress(FileNotFoundError):
                if entry.name.endswith(".frame"):
                    status = entry.stat()
                    frames.append((status.st_mtime_ns, status.st_size, entry.path))
                    total += status.st_size
                else:
                    self._remove_leftovers(entry.name[:32])
        for _, size, path in sorted(frames):
            if total <= keep:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total

    def _entries(self) -> Iterator[os.DirEntry]:
        """Files of this class only: the folder may hold others."""
        with os.scandir(self.folder) as folders:
            for folder in folders:
                if re.fullmatch("[0-9a-f]{2}", folder.name) and folder.is_dir():
                    with os.scandir(folder.path) as entries:
                        yield from (entry for entry in entries if _NAME.fullmatch(entry.name))

    def _remove_leftovers(self, digest: str) -> None:
        """Removes a frame's temporary file and lock, unless the lock is held."""
        with self._frame_lock(digest, 0, None) as mine:
            if mine:
                self._path(digest, "tmp").unlink(missing_ok=True)

    @contextmanager
    def _frame_lock(self, digest: str, seconds: float, policy: RetryPolicy | None) -> Generator[bool]:
        path, file = self._path(digest, "lock"), None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _acquire(path, seconds, policy)
        except OSError as error:
            self._warn(error)
        try:
            yield file is not None
        finally:
            if file is not None:
                with suppress(OSError):
                    path.unlink()
                _close(file)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            log.warning("the cache in %s cannot be used (%s); frames are fetched without it", self.folder, error)
        self._warned = True


@contextmanager
def _locked(path: Path, seconds: float, policy: RetryPolicy | None) -> Generator[int | None]:
    """The descriptor of ``path``, created if it is missing, with an exclusive lock; None if it is not free in time."""
    file = _acquire(path, seconds, policy)
    try:
        yield file
    finally:
        if file is not None:
            _close(file)


def _close(file: int) -> None:
    with suppress(OSError):  # which the file system may report late; the descriptor is free all the same
        os.close(file)


def _acquire(path: Path, seconds: float, policy: RetryPolicy | None) -> int | None:
    """Polls: a thread that waits in flock(2) itself cannot be cancelled. Raises Cancelled; OSError if the file system
    has no such locks."""
    deadline, pause = time.monotonic() + seconds, 0.002
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file in between; then this lock protects nothing.
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError:
            _close(file)
            with suppress(OSError):
                path.unlink()  # else each frame would leave one, where there are no locks
            raise
        _close(file)
        if time.monotonic() >= deadline:
            return None
        if policy is None:
            time.sleep(pause)
        elif policy.cancelled.wait(pause):
            raise Cancelled
        pause = min(2 * pause, 0.05)
