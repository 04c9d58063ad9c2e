"""Local files of which no reader ever sees a part: written under a temporary name in the same folder, then renamed."""

import errno
import os
import re
import secrets
from collections.abc import Generator
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")
# What CIFS, FUSE, 9p and others answer to an fsync of a folder, or to opening one.
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM}


class NoHardLinks(Exception):
    """The file system has none, so no file can be created there whole and at most once."""


@contextmanager
def atomic_write(path: str | Path, *, durable: bool, temporary: Path | None = None) -> Generator[BufferedWriter]:
    """A new file that replaces ``path`` when the context is left without an error, and is removed after an error.

    ``durable``: a later power cut loses neither the bytes nor the name. ``temporary``: see ``temporary_file``. The
    folder must exist. Raises OSError.
    """
    with temporary_file(Path(path), temporary) as (file, written):
        yield file
        file.flush()
        if durable:
            os.fsync(file.fileno())
        os.replace(written, path)
        if durable:
            fsync_folder(Path(path).parent)


def atomic_create(path: Path, data: bytes) -> None:
    """A new durable file that is there as a whole or not at all: link(2) is done at most once per name. O_EXCL would
    show an empty file first, for ever if the writer is then killed.

    The folder must exist. Raises FileExistsError if there is a file, NoHardLinks, OSError.
    """
    with temporary_file(path) as (file, temporary):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno in _NO_HARD_LINKS:
                raise NoHardLinks(str(path)) from error
            raise
        fsync_folder(path.parent)


@contextmanager
def temporary_file(path: Path, temporary: Path | None = None) -> Generator[tuple[BufferedWriter, Path]]:
    """A file in the folder of ``path``, open for writing, and its own path; removed when the context is left.

    Its name is ``.<name of path>.<16 hex digits>.tmp``, random, because two writers must not share it; or
    ``temporary``, if the caller knows that no other process writes: then it reuses the file of a killed writer.
    """
    written = temporary or path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(written, "wb" if temporary else "xb") as file:
            yield file, written
    finally:
        with suppress(OSError):  # a leftover is harmless, and the error that led here says more
            written.unlink()


def destination(temporary: Path) -> Path | None:
    """The ``path`` of the ``temporary_file`` with this name; None if it has another's name."""
    name = _TEMPORARY.fullmatch(temporary.name)
    return temporary.with_name(name[1]) if name else None


def fsync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` durable: fsync of a new file alone does not. A file system that knows no fsync of
    folders, or does not let this user open one, has its own way."""
    with _where_known(), _opened(folder) as fd:
        os.fsync(fd)


@contextmanager
def _where_known() -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise


@contextmanager
def _opened(folder: Path) -> Generator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)
