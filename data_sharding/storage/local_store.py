"""A RUN's store in a folder of a local or network file system."""

import errno
import os
import shutil
import stat
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import BufferedWriter
from pathlib import Path

from data_sharding.errors import BadPlace, UserError
from data_sharding.storage.atomic_write import NoHardLinks, atomic_create, atomic_write, destination, fsync_folder
from data_sharding.storage.bad_places import may_be_bad_place
from data_sharding.storage.failures import failure, unreachable
from data_sharding.storage.retry import RetriesExhausted, RetryPolicy, retry_local
from data_sharding.storage.store import Bytes, Result, Store, Writable

_WRITEBACK = 16 << 20  # bytes after which the kernel is told to write a growing file to disk


class LocalStore(Store):
    """Files in a folder, NFS included.

    On NFS, if the reply to a link of ``create`` was lost, the retry fails with "exists" for our own file: the nonce
    tells, as on S3.
    """

    def __init__(self, url: str, policy: RetryPolicy = RetryPolicy(deadline=120)) -> None:  # noqa: B008 - immutable
        self._root = Path(url.removeprefix("file://")).expanduser().absolute()
        self.url, self._policy = str(self._root), policy
        self._allowed: set[str] = set()  # of "read" and "write": what has succeeded before

    def read_range(
        self,
        path: str,
        begin: int | None,
        end: int | None,
        check: Callable[[Bytes], Result],
        buffer: bytearray | None = None,
    ) -> Result:
        def act() -> Result:
            with open(self.path(path), "rb") as file:
                file.seek(begin or 0)
                if end is None:
                    return check(file.read())
                size = end - (begin or 0)
                if buffer is None or len(buffer) < size:
                    return check(file.read(size))
                data = memoryview(buffer)[:size]
                return check(data[: file.readinto(data)])

        return self._reading(self.path(path), act)

    def size(self, path: str) -> int:
        found = self._reading(self.path(path), lambda: os.stat(self.path(path)))
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(self.path(path))
        return found.st_size

    def create(self, path: str, data: bytes) -> None:
        self._writing(self.path(path), lambda: self._create(path, data), once=True)

    def _create(self, path: str, data: bytes) -> None:
        try:
            atomic_create(self._destination(path), data)
        except NoHardLinks as error:
            raise UserError(
                f"{self.url}: this file system has no hard links, which the run log needs; "
                "put the run folder on another file system."
            ) from error

    def put(self, path: str, data: bytes) -> None:
        def act() -> None:
            with atomic_write(self._destination(path), durable=True) as file:
                file.write(data)

        self._writing(self.path(path), act)

    @contextmanager
    def writing(self, path: str, size: int) -> Generator[Writable]:
        try:
            with atomic_write(self._destination(path), durable=True) as file:
                yield _EarlyWriteback(file)
        except OSError as error:  # not retried: what was written is gone
            raise failure(self.path(path), error) from error

    def list(self, prefix: str) -> list[str]:
        folder = self.path(prefix if prefix.endswith("/") else os.path.dirname(prefix))
        paths = (os.path.relpath(path, self._root) for path in self._files(folder) if not path.endswith(".tmp"))
        return sorted(path for path in paths if path.startswith(prefix))

    def _files(self, folder: str) -> Sequence[str]:
        """The paths of all files below ``folder``; what disappears meanwhile is left out."""

        def unless_gone(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise error

        def act() -> Sequence[str]:
            walk = os.walk(folder, onerror=unless_gone)  # by itself it would pass over every error
            return [os.path.join(where, name) for where, _, names in walk for name in names]

        return self._reading(folder, act)

    def _delete_tree(self, path: str) -> None:
        def unless_gone(_, where: str, error: BaseException) -> None:
            if not isinstance(error, FileNotFoundError) and not _is_held_by_nfs(where, error):
                raise error

        try:
            shutil.rmtree(self.path(path), onerror=lambda act, where, info: unless_gone(act, where, info[1]))
        except OSError as error:  # not retried: `checkpoint sweep` deletes what is left
            raise failure(self.path(path), error) from error

    def uploads(self) -> Sequence[tuple[str, str]]:
        found = ((Path(file), destination(Path(file))) for file in sorted(self._files(self.url)))
        return [(str(final.relative_to(self._root)), file.name) for file, final in found if final is not None]

    def abort_upload(self, path: str, upload: str) -> None:
        folder = Path(self.path(path)).parent
        self._writing(self.path(path), lambda: (folder / upload).unlink(missing_ok=True))
        with suppress(OSError):  # if it was the only one, the folder goes too
            folder.rmdir()

    def _reading(self, where: str, act: Callable[[], Result]) -> Result:
        """``act()`` on what is at ``where``, retried. Raises FileNotFoundError if it is missing or a folder,
        StorageDown, and UserError if it may not be read."""
        try:
            return self._retried("read", where, act)
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(str(error)) from error
        except FileNotFoundError:
            raise
        except OSError as error:
            raise failure(where, error) from error

    def _writing(self, where: str, act: Callable[[], Result], once: bool = False) -> Result:
        """``act()`` on what is at ``where``, retried. Raises StorageDown, and UserError if it may not be written;
        FileExistsError if it is to be written but ``once``."""
        try:
            return self._retried("write", where, act)
        except OSError as error:
            if once and isinstance(error, FileExistsError):
                raise
            raise failure(where, error) from error

    def _retried(self, kind: str, where: str, act: Callable[[], Result]) -> Result:
        """A refusal is retried if this store has read, or written, before: what was allowed once may be again."""
        policy = replace(self._policy, retry_refused=kind in self._allowed)
        try:
            result = retry_local(policy, where, act, writing=kind == "write")
        except RetriesExhausted as error:
            if kind == "read" and may_be_bad_place(error.__cause__):
                raise BadPlace(str(unreachable(where, error, local=True))) from error
            raise unreachable(where, error, local=True) from error
        self._allowed.add(kind)
        return result

    def _destination(self, path: str) -> Path:
        """The path of the object; its folder is created."""
        final = Path(self.path(path))
        _make_folder(final.parent)
        return final


class _EarlyWriteback:
    """Has data written to disk as it arrives, so that the fsync has little left to wait for.

    The kernel would collect it in memory first. Nor need it be kept there: nobody reads a commit that soon.
    """

    def __init__(self, file: BufferedWriter) -> None:
        self._file, self._started = file, 0

    def write(self, data: Bytes) -> None:
        self._file.write(data)
        if self._file.tell() - self._started >= _WRITEBACK:
            self._file.flush()
            at = self._file.tell()
            # For pages that are not on disk yet, this starts the writing and does not wait for it.
            with suppress(OSError):  # advice
                os.posix_fadvise(self._file.fileno(), self._started, at - self._started, os.POSIX_FADV_DONTNEED)
            self._started = at


def _is_held_by_nfs(where: str, error: BaseException) -> bool:
    """Whether a file or folder cannot be deleted because somebody has a deleted file of it open: NFS keeps that as
    .nfs… until it is closed, and deletes it then."""
    if isinstance(error, OSError) and error.errno in (errno.EBUSY, errno.ENOTEMPTY, errno.EEXIST):
        names = os.listdir(where) if os.path.isdir(where) else [os.path.basename(where)]
        return all(name.startswith(".nfs") or os.path.isdir(os.path.join(where, name)) for name in names)
    return False


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as error:  # no folder, though; for ``create`` this error means something else
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
    fsync_folder(folder.parent)  # else a power cut could take the new folder with the durable file in it
