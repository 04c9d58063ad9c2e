"""A RUN's store in a folder of a local or network file system."""

import errno
import os
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path

from data_sharding.errors import UserError
from data_sharding.storage.atomic_write import atomic_write, destination, fsync_folder, temporary_file
from data_sharding.storage.store import Bytes, Result, Store, Writable

_WRITEBACK = 16 << 20  # bytes after which the kernel is told to write a growing file to disk
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}


class LocalStore(Store):
    """Files in a folder, NFS included.

    ``create`` writes a temporary file and links it (link(2)) to its name, which a file system does at most once per
    name, and with the contents complete; O_EXCL would show an empty file first, for ever if the writer is then killed.
    On NFS, if the reply to a link was lost, the retry fails with "exists" for our own file: the nonce tells, as on S3.
    """

    def __init__(self, url: str) -> None:
        self._root = Path(url.removeprefix("file://")).expanduser().absolute()
        self.url = str(self._root)

    def read_range(
        self,
        path: str,
        begin: int | None,
        end: int | None,
        check: Callable[[Bytes], Result],
        buffer: bytearray | None = None,
    ) -> Result:
        with open(self.path(path), "rb") as file:
            file.seek(begin or 0)
            if end is None:
                return check(file.read())
            size = end - (begin or 0)
            if buffer is None or len(buffer) < size:
                return check(file.read(size))
            data = memoryview(buffer)[:size]
            return check(data[: file.readinto(data)])

    def size(self, path: str) -> int:
        if not os.path.isfile(self.path(path)):
            raise FileNotFoundError(self.path(path))
        return os.path.getsize(self.path(path))

    def create(self, path: str, data: bytes) -> None:
        final = self._destination(path)
        with temporary_file(final) as (file, temporary):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            try:
                os.link(temporary, final)
            except OSError as error:
                if error.errno in _NO_HARD_LINKS:
                    raise UserError(
                        f"{self.url}: this file system has no hard links, which the run log needs; "
                        "put the run folder on another file system."
                    ) from error
                raise
            fsync_folder(final.parent)

    def put(self, path: str, data: bytes) -> None:
        with self.writing(path, len(data)) as file:
            file.write(data)

    @contextmanager
    def writing(self, path: str, size: int) -> Generator[Writable]:
        with atomic_write(self._destination(path), durable=True) as file:
            yield _EarlyWriteback(file)

    def list(self, prefix: str) -> list[str]:
        folder = Path(self.path(prefix if prefix.endswith("/") else os.path.dirname(prefix)))
        found = (os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)
        paths = (os.path.relpath(path, self._root) for path in found if not path.endswith(".tmp"))
        return sorted(path for path in paths if path.startswith(prefix))

    def _delete_tree(self, path: str) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(self.path(path))

    def uploads(self) -> Sequence[tuple[str, str]]:
        return [
            (str(destination(file.relative_to(self._root))), file.name) for file in sorted(self._root.rglob(".*.tmp"))
        ]

    def abort_upload(self, path: str, upload: str) -> None:
        folder = Path(self.path(path)).parent
        (folder / upload).unlink(missing_ok=True)
        with suppress(OSError):  # if it was the only one, the folder goes too
            folder.rmdir()

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
            os.posix_fadvise(self._file.fileno(), self._started, at - self._started, os.POSIX_FADV_DONTNEED)
            self._started = at


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)  # else a power cut could take the new folder with the durable file in it
