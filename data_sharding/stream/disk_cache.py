"""A node's cache of compressed frames on its own disk, shared by all its ranks, and by runs on the same data.

    CACHE/3f/3f09…c2.frame    a whole frame, named by its digest; appears by rename, last used at its mtime
    CACHE/3f/3f09…c2.tmp      being written, by whoever holds …
    CACHE/3f/3f09…c2.lock     … this lock: the frame is being fetched, others wait for it
    CACHE/usage               bytes reserved so far, never fewer than are there; itself the lock of all who change it

The cache is a help and never a need: whatever goes wrong with the disk, frames are fetched all the same. Locks are
flock(2), which the kernel takes from a killed process, so nothing that is left behind can block; and each frame read is
compared with its digest, so a torn one is only a miss. A frame may be evicted while it is read: the reader holds the
file open, and who comes later fetches it again.

Bound: ``max_bytes`` counts frames; eviction takes the least recently used until a tenth is free. Whoever kills a writer
loses its reservation until the next eviction counts anew.
"""

import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_sharding.storage.atomic_write import atomic_write
from data_sharding.storage.filesystems import Cancelled
from data_sharding.storage.retry import CorruptRead, RetryPolicy

_NAME = re.compile(r"[0-9a-f]{32}\.(frame|tmp|lock)")
_FREE = 0.1  # share of the cache that an eviction frees
_QUARREL = 10.0  # seconds to wait for the lock on the usage, then store nothing

log = logging.getLogger(__name__)


class DiskCache:
    """Safe for any number of threads and processes on one machine."""

    def __init__(self, folder: str, max_bytes: int):
        self.folder, self.max_bytes = Path(folder).expanduser().absolute(), max_bytes
        self._complained = False

    def get(
        self, digest: str, *, check: Callable[[bytes], None], fetch: Callable[[], bytes], policy: RetryPolicy
    ) -> bytes:
        """The frame of this digest; on a miss ``fetch`` brings it, on one rank while the others wait.

        Who waits longer than three attempts last fetches by itself, in case the fetching process was stopped. Raises
        what ``fetch`` raises, and Cancelled. ``check`` raises CorruptRead.
        """
        if (data := self._read(digest, check)) is not None:
            return data
        with self._claimed(digest, 3 * policy.attempt, policy) as mine:
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
            self._complain(error)
            return None
        return data

    def _store(self, digest: str, data: bytes) -> None:
        """Needs the frame's claim."""
        path, temporary = self._path(digest, "frame"), self._path(digest, "tmp")
        try:
            if self._reserve(len(data)):
                with atomic_write(path, durable=False, temporary=temporary) as file:
                    file.write(data)
        except OSError as error:
            self._complain(error)

    def _reserve(self, size: int) -> bool:
        """Whether ``size`` more bytes may be stored; evicts if there is no room."""
        with _locked(self.folder / "usage", _QUARREL, None) as file:
            if file is None:
                return False
            text = os.pread(file, 32, 0)
            used = int(text) if text.strip().isdigit() else self._evict(self.max_bytes)
            if used + size > self.max_bytes:
                used = self._evict(int((1 - _FREE) * self.max_bytes) - size)
            if used + size > self.max_bytes:
                return False
            os.pwrite(file, b"%020d\n" % (used + size), 0)
            return True

    def _evict(self, keep: int) -> int:
        """Removes what killed writers left, and frames, the least recently used first, until at most ``keep`` bytes
        are there. Returns how many are."""
        frames, total = [], 0
        for entry in self._entries():
            with suppress(FileNotFoundError):
                if entry.name.endswith(".frame"):
                    status = entry.stat()
                    frames.append((status.st_mtime_ns, status.st_size, entry.path))
                    total += status.st_size
                else:
                    self._tidy(entry.name[:32])
        for _, size, path in sorted(frames):
            if total <= keep:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total

    def _entries(self) -> Iterator[os.DirEntry]:
        """Only what this class has made: the folder may hold other things."""
        with os.scandir(self.folder) as folders:
            for folder in folders:
                if re.fullmatch("[0-9a-f]{2}", folder.name) and folder.is_dir():
                    with os.scandir(folder.path) as entries:
                        yield from (entry for entry in entries if _NAME.fullmatch(entry.name))

    def _tidy(self, digest: str) -> None:
        """Removes a frame's temporary file and lock, unless someone holds it."""
        with self._claimed(digest, 0, None) as mine:
            if mine:
                self._path(digest, "tmp").unlink(missing_ok=True)

    @contextmanager
    def _claimed(self, digest: str, seconds: float, policy: RetryPolicy | None) -> Generator[bool]:
        path = self._path(digest, "lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._complain(error)
            yield False
            return
        with _locked(path, seconds, policy) as file:
            try:
                yield file is not None
            finally:
                if file is not None:
                    with suppress(OSError):
                        path.unlink()

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            log.warning("the cache in %s cannot be used (%s); frames are fetched without it", self.folder, error)
        self._complained = True


@contextmanager
def _locked(path: Path, seconds: float, policy: RetryPolicy | None) -> Generator[int | None]:
    """The descriptor of ``path``, made if need be, under an exclusive lock; None if it cannot be had in time."""
    file = _acquire(path, seconds, policy)
    try:
        yield file
    finally:
        if file is not None:
            os.close(file)


def _acquire(path: Path, seconds: float, policy: RetryPolicy | None) -> int | None:
    """Polls: a thread that waits in flock(2) itself could not be told to leave. Raises Cancelled."""
    give_up, pause = time.monotonic() + seconds, 0.002
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            return None
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before may have removed the file in between; then this lock is on nothing.
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)
        if time.monotonic() >= give_up:
            return None
        if policy is None:
            time.sleep(pause)
        elif policy.cancelled.wait(pause):
            raise Cancelled
        pause = min(2 * pause, 0.05)
