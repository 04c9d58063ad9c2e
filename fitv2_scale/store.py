"""The object-store contract on which a RUN stands: whole objects, conditional create, no rename, no append.

Every operation here is one that S3 has too, so what is built on it carries over. Paths are relative to the store's URL,
with forward slashes; there are no folders, only objects whose paths share a prefix.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from data_sharding.errors import UserError

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}


class Store:
    """Objects below one URL, kept in a local folder.

    ``url`` is a local path or ``file://`` URL; the folder need not exist yet. What ``create`` and ``put`` have written
    is durable (fsync of file and folder) when they return, and no reader ever sees half of it.
    """

    def __init__(self, url: str) -> None:
        if url.startswith("s3://"):
            raise UserError(f"{url}: RUN folders on S3 arrive with a later release; give a local folder for now.")
        if "://" in url and not url.startswith("file:///"):
            raise UserError(f"{url}: a RUN folder is a local path or a file:/// URL; give one of these.")
        self._root = Path(url.removeprefix("file://")).expanduser().absolute()
        self.url = str(self._root)

    def path(self, rel: str) -> str:
        """The local path (on S3: the URL) of the object or prefix ``rel``. Raises ValueError if it leaves the store."""
        if PurePosixPath(rel).is_absolute() or ".." in PurePosixPath(rel).parts:
            raise ValueError(f"{rel!r} leaves the store at {self.url}")
        return str(self._root / rel)

    def read(self, path: str) -> bytes:
        """The whole object. Raises FileNotFoundError if there is none."""
        return Path(self.path(path)).read_bytes()

    def exists(self, path: str) -> bool:
        """True if there is an object at ``path``; a mere prefix of objects is not one."""
        return os.path.isfile(self.path(path))

    def create(self, path: str, data: bytes) -> None:
        """Writes the object if and only if there is none: one atomic act. Raises FileExistsError if there is one."""
        with self._staged(path, data) as (staged, final):
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
        """Writes the object, replacing an older one atomically."""
        with self._staged(path, data) as (staged, final):
            os.replace(staged, final)
            fsync_folder(final.parent)

    def list(self, prefix: str) -> list[str]:
        """The paths of all objects that start with ``prefix``, sorted. On S3 a hint only: never build on it."""
        folder = Path(self.path(prefix if prefix.endswith("/") else os.path.dirname(prefix)))
        found = (os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)
        paths = (os.path.relpath(path, self._root) for path in found if not path.endswith(".tmp"))
        return sorted(path for path in paths if path.startswith(prefix))

    def delete_tree(self, path: str) -> None:
        """Deletes every object below ``path/``; deleting what is gone already is fine."""
        if PurePosixPath(path) == PurePosixPath("."):
            raise ValueError(f"refusing to delete all of {self.url}")
        with suppress(FileNotFoundError):
            shutil.rmtree(self.path(path))

    @contextmanager
    def _staged(self, path: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        """Writes ``data`` to a durable temporary file beside its destination; yields both paths, then tidies up."""
        final = Path(self.path(path))
        _make_folder(final.parent)
        staged = final.parent / f".{final.name}.{secrets.token_hex(8)}.tmp"
        try:
            with open(staged, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield staged, final
        finally:
            staged.unlink(missing_ok=True)


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
