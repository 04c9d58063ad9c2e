"""The object-store contract on which a RUN stands: whole objects, conditional create, no append.

Every operation is one that S3 has too. Paths are relative to the store's URL, with forward slashes; there are no
folders, only objects whose paths share a prefix. ``LocalStore`` keeps them in a folder, ``s3_store.S3Store`` in a
bucket; ``open_store`` chooses.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import PurePosixPath
from typing import Any, Protocol, TypeVar

from data_sharding.storage.json_bytes import RESTORE, from_json, to_json
from data_sharding.storage.records import ListOf, Shape

Result = TypeVar("Result")
Bytes = bytes | memoryview


class Writable(Protocol):
    """An object that is being written, piece by piece."""

    def write(self, data: Bytes, /) -> object: ...


class Store(ABC):
    """Objects below one ``url``. Safe to share between threads.

    What ``create``, ``put`` and ``writing`` have written is durable when they return, and no reader ever sees part of
    it. Storage that does not answer until a deadline, or has no room left, is StorageDown; one that refuses access, or
    a name that cannot be used, a UserError. Other OSErrors than those named below are never raised.
    """

    url: str

    def path(self, rel: str) -> str:
        """The local path or URL of the object or prefix ``rel``. Raises ValueError if it is outside of the store."""
        if PurePosixPath(rel).is_absolute() or ".." in PurePosixPath(rel).parts:
            raise ValueError(f"{rel!r} is outside of the store at {self.url}")
        return os.path.join(self.url, rel) if rel else self.url

    def read(self, path: str) -> bytes:
        """The whole object. Raises FileNotFoundError if there is none."""
        return self.read_range(path, None, None, bytes)

    @abstractmethod
    def read_range(
        self,
        path: str,
        begin: int | None,
        end: int | None,
        check: Callable[[Bytes], Result],
        buffer: bytearray | None = None,
    ) -> Result:
        """``check(bytes [begin, end) of the object)``, fewer if the object ends before. They may lie in ``buffer`` if
        it is large enough: a caller that reads much need not allocate memory for each piece.

        ``check`` may raise ``retry.CorruptRead``: over a network, the bytes are then read again.
        Raises FileNotFoundError, CorruptRead.
        """

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of the object. Raises FileNotFoundError; a prefix of objects is not an object."""

    def exists(self, path: str) -> bool:
        """True if there is an object at ``path``."""
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    @abstractmethod
    def create(self, path: str, data: bytes) -> None:
        """Writes the object if and only if there is none, atomically. Raises FileExistsError if there is one.

        After a lost reply the existing one may be this one: put a nonce in ``data`` and read it back.
        """

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Writes the object, replacing an older one atomically."""

    def read_json(self, path: str, shape: type[Shape | ListOf] | None = None, remedy: str = RESTORE) -> Any:
        """The JSON value at ``path``, None if there is no such object. Raises as ``from_json``."""
        try:
            return from_json(self.read(path), self.path(path), shape, remedy)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def create_json(self, path: str, value: Any, indent: int | None = None) -> None:
        """As ``create``, with ``value`` as JSON (see ``to_json``)."""
        self.create(path, to_json(value, indent))

    def put_json(self, path: str, value: Any, indent: int | None = None) -> None:
        """As ``put``, with ``value`` as JSON (see ``to_json``)."""
        self.put(path, to_json(value, indent))

    @abstractmethod
    def writing(self, path: str, size: int) -> AbstractContextManager[Writable]:
        """Writes an object of ``size`` bytes piece by piece. It exists once the context is left without an error."""

    @abstractmethod
    def list(self, prefix: str) -> list[str]:
        """The paths of all objects that start with ``prefix``, sorted. On S3 a hint only: never build on it."""

    def delete_tree(self, path: str) -> None:
        """Deletes every object below ``path/``; objects that are gone already are no error."""
        if PurePosixPath(path) == PurePosixPath("."):
            raise ValueError(f"refusing to delete all of {self.url}")
        self._delete_tree(path)

    @abstractmethod
    def _delete_tree(self, path: str) -> None: ...

    @abstractmethod
    def uploads(self) -> Sequence[tuple[str, str]]:
        """(path, id) of each object of which an upload was started, by any process, and neither finished nor aborted.
        ``list`` does not show them."""

    @abstractmethod
    def abort_upload(self, path: str, upload: str) -> None:
        """Aborts one of ``uploads``, which frees its space; one that is gone already is no error."""
