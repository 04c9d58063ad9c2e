"""Byte ranges of files, each read in one request with retries."""

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

from data_sharding.errors import DataError
from data_sharding.storage.files import fs_call, read
from data_sharding.storage.filesystems import file_system, is_local, refuse_pipe
from data_sharding.storage.retry import CorruptRead

_BUFFER = 1 << 23
_READERS = 8  # requests in flight: a network file system or an object store answers them in parallel


class ByteRange(NamedTuple):
    """``size`` bytes of the file at ``url``, from ``start``; the whole file if ``start`` is None."""

    url: str
    start: int | None
    size: int

    def read(self) -> bytes:
        """The bytes. Raises FileNotFoundError, StorageDown, or DataError if the file has become shorter."""
        if self.start is None:
            return read(self.url)
        return read_range(self.url, self.start, self.start + self.size)


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of the file at ``url``.

    Raises FileNotFoundError, StorageDown, or DataError if the file ends before.
    """

    def whole(data: bytes) -> bytes:
        if len(data) != end - start:
            raise CorruptRead(f"{len(data)} of {end - start} bytes were read", str(len(data)))
        return data

    try:
        return fs_call(url, "cat_file", whole, start=start, end=end) if start < end else b""
    except CorruptRead as error:
        raise DataError(f"{url} ends before byte {end}: it has changed; run the command again") from error


def read_all(ranges: Iterable[ByteRange]) -> list[bytes]:
    """The bytes of each, read in parallel."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(ByteRange.read, ranges))


def open_binary(url: str) -> BinaryIO:
    """The file, seekable. Raises as ``read_range``, also when it is read later."""
    fs, path = file_system(url)
    if not is_local(fs):
        return io.BufferedReader(_Remote(url), _BUFFER)
    refuse_pipe(path)
    return open(path, "rb")


class _Remote(io.RawIOBase):
    """A file on an object store, read by ranges, each with retries."""

    def __init__(self, url: str):
        self._url, self._size, self._at = url, int(fs_call(url, "size")), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer) -> int:
        data = read_range(self._url, self._at, min(self._at + len(buffer), self._size))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
