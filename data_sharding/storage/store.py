"""The object-store contract on which a RUN stands: whole objects, conditional create, no append.

Every operation is one that S3 has too. Paths are relative to the store's URL, with forward slashes; there are no
folders, only objects whose paths share a prefix. ``LocalStore`` keeps them in a folder, ``s3_store.S3Store`` in a
bucket; ``open_store`` chooses.
"""

import errno
import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from io import BufferedWriter
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from data_sharding.errors import UserError

Result = TypeVar("Result")
Bytes = bytes | memoryview

_STEADILY = 16 << 20  # bytes after which a file that grows is handed to the disk
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}


class Writable(Protocol):
    def write(self, data: Bytes, /) -> object: ...


class Store(ABC):
    """Objects below one ``url``. Safe to share between threads.

    What ``create``, ``put`` and ``writing`` have written is durable when they return, and no reader ever sees half of
    it. A local disk's trouble is an OSError; storage that does not answer is StorageDown, one that refuses a UserError.
    """

    url: str

    def path(self, rel: str) -> str:
        """Where the object or prefix ``rel`` is: a local path or a URL. Raises ValueError if it leaves the store."""
        if PurePosixPath(rel).is_absolute() or ".." in PurePosixPath(rel).parts:
            raise ValueError(f"{rel!r} leaves the store at {self.url}")
        return os.path.join(self.url, rel) if rel else self.url

    def read(self, path: str) -> bytes:
        """The whole object. Raises FileNotFoundError if there is none."""
        return self.read_range(path, None, None, lambda data: data)

    @abstractmethod
    def read_range(
        self,
        path: str,
        begin: int | None,
        end: int | None,
        check: Callable[[Bytes], Result],
        room: bytearray | None = None,
    ) -> Result:
        """``check(bytes [begin, end) of the object)``, which are fewer where the object ends before. They may lie in
        ``room``, if that is given and large enough: who reads much need not have new memory for each piece.

        ``check`` may raise ``patience.Faulty``: where what came can differ from what is stored, it is read again.
        Raises FileNotFoundError, Faulty.
        """

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of the object. Raises FileNotFoundError; a mere prefix of objects is none."""

    def exists(self, path: str) -> bool:
        """True if there is an object at ``path``."""
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    @abstractmethod
    def create(self, path: str, data: bytes) -> None:
        """Writes the object if and only if there is none: one atomic act. Raises FileExistsError if there is one.

        After a lost reply the one that is there may be this one: put a nonce in ``data`` and read it back.
        """

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Writes the object, replacing an older one atomically."""

    @abstractmethod
    def writing(self, path: str, size: int) -> AbstractContextManager[Writable]:
        """Writes an object of ``size`` bytes piece by piece. It is there once the context is left without an error."""

    @abstractmethod
    def list(self, prefix: str) -> list[str]:
        """The paths of all objects that start with ``prefix``, sorted. On S3 a hint only: never build on it."""

    def delete_tree(self, path: str) -> None:
        """Deletes every object below ``path/``; deleting what is gone already is fine."""
        if PurePosixPath(path) == PurePosixPath("."):
            raise ValueError(f"refusing to delete all of {self.url}")
        self._delete_tree(path)

    @abstractmethod
    def _delete_tree(self, path: str) -> None: ...

    @abstractmethod
    def uploads(self) -> Sequence[tuple[str, str]]:
        """(path, id) of each object whose writing was begun and neither finished nor given up, by whomever. ``list``
        does not show them."""

    @abstractmethod
    def abort_upload(self, path: str, upload: str) -> None:
        """Gives one of ``uploads`` up, which frees its space; one that is gone already is fine."""


def open_store(url: str) -> Store:
    """The store at a local path, file:// or s3:// URL, which need not hold anything yet. Raises UserError."""
    if url.startswith("s3://"):
        from data_sharding.storage.s3_store import S3Store  # only here: s3fs is an extra

        return S3Store(url)
    if "://" in url and not url.startswith("file:///"):
        raise UserError(f"{url}: give a local path, a file:/// URL or an s3:// URL.")
    return LocalStore(url)


class LocalStore(Store):
    """Files in a folder, NFS included.

    ``create`` writes a temporary file and links it (link(2)) to its name, which a file system does at most once per
    name, and with the contents complete; O_EXCL would show an empty file first, for ever if the writer is then killed.
    On NFS a link whose reply was lost may say "exists" for one's own: the nonce tells, as on S3.
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
        room: bytearray | None = None,
    ) -> Result:
        with open(self.path(path), "rb") as file:
            file.seek(begin or 0)
            if end is None:
                return check(file.read())
            size = end - (begin or 0)
            if room is None or len(room) < size:
                return check(file.read(size))
            data = memoryview(room)[:size]
            return check(data[: file.readinto(data)])

    def size(self, path: str) -> int:
        if not os.path.isfile(self.path(path)):
            raise FileNotFoundError(self.path(path))
        return os.path.getsize(self.path(path))

    def create(self, path: str, data: bytes) -> None:
        with self._staged(path) as (file, staged, final):
            file.write(data)
            _sync(file)
            try:
                os.link(staged, final)
            except OSError as error:
                if error.errno in _NO_HARD_LINKS:
                    raise UserError(
                        f"{self.url}: this file system has no hard links, which the run log needs; "
                        "put the run folder on another one."
                    ) from error
                raise
            fsync_folder(final.parent)

    def put(self, path: str, data: bytes) -> None:
        with self.writing(path, len(data)) as file:
            file.write(data)

    @contextmanager
    def writing(self, path: str, size: int) -> Iterator[Writable]:
        with self._staged(path) as (file, staged, final):
            yield _Steadily(file)
            _sync(file)
            os.replace(staged, final)
            fsync_folder(final.parent)

    def list(self, prefix: str) -> list[str]:
        folder = Path(self.path(prefix if prefix.endswith("/") else os.path.dirname(prefix)))
        found = (os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)
        paths = (os.path.relpath(path, self._root) for path in found if not path.endswith(".tmp"))
        return sorted(path for path in paths if path.startswith(prefix))

    def _delete_tree(self, path: str) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(self.path(path))

    def uploads(self) -> Sequence[tuple[str, str]]:
        staged = sorted(self._root.rglob(".*.tmp"))
        return [(str(file.relative_to(self._root).with_name(file.name[1:-21])), file.name) for file in staged]

    def abort_upload(self, path: str, upload: str) -> None:
        folder = Path(self.path(path)).parent
        (folder / upload).unlink(missing_ok=True)
        with suppress(OSError):  # if it was the only one, the folder goes too
            folder.rmdir()

    @contextmanager
    def _staged(self, path: str):
        """A temporary file, .<name>.<16 digits>.tmp beside its destination, and both paths; afterwards it is gone."""
        final = Path(self.path(path))
        _make_folder(final.parent)
        staged = final.parent / f".{final.name}.{secrets.token_hex(8)}.tmp"
        try:
            with open(staged, "xb") as file:
                yield file, staged, final
        finally:
            staged.unlink(missing_ok=True)


class _Steadily:
    """Hands what is written to the disk as it comes, so that little is left for the fsync to wait for.

    The kernel would gather it in memory first. It also need not keep it there: nobody reads a commit that soon.
    """

    def __init__(self, file: BufferedWriter) -> None:
        self._file, self._handed = file, 0

    def write(self, data: Bytes) -> None:
        self._file.write(data)
        if self._file.tell() - self._handed >= _STEADILY:
            self._file.flush()
            at = self._file.tell()
            # Of pages that are not on disk yet, this begins the writing and does not wait for it.
            os.posix_fadvise(self._file.fileno(), self._handed, at - self._handed, os.POSIX_FADV_DONTNEED)
            self._handed = at


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)  # else a power cut could take the new folder with the durable file in it


def fsync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` durable: fsync of a new file alone does not."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
