"""Where the bytes of one file lie: a file of its own, or a stretch of a tar, which is read without unpacking it."""

import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

from data_sharding.connect import file_system
from data_sharding.errors import DataError, StorageDown, UserError
from data_sharding.patience import Exhausted, Faulty, Patience, patiently
from data_sharding.storage import read

_PATIENCE = Patience(deadline=120, attempt=120)
_READERS = 8  # requests in flight: a network file system or an object store answers them side by side


class Extent(NamedTuple):
    """``size`` bytes of the file at ``url``, from ``start``; all of it where ``start`` is None."""

    url: str
    start: int | None
    size: int

    def read(self) -> bytes:
        """Raises FileNotFoundError, or DataError if the tar has become shorter."""
        if self.start is None:
            return read(self.url)
        data = read_range(self.url, self.start, self.start + self.size)
        if len(data) != self.size:
            raise DataError(f"{self.url} ends before byte {self.start + self.size}: it has changed, start again")
        return data


def read_range(url: str, start: int, end: int) -> bytes:
    """Fewer bytes where the file ends before."""
    return ask(url, "cat_file", start=start, end=end) if start < end else b""


def ask(url: str, method: str, **options) -> Any:
    """``method`` of the file system of ``url`` on its path, tried again where that may help. Raises StorageDown."""
    try:
        return patiently(_PATIENCE, url, method, check=lambda result: result, **options)
    except Faulty:  # a range behind the end of the file
        return b""
    except Exhausted as error:
        raise StorageDown(f"{url} cannot be reached: {error}; check the storage, then start again") from error


def read_all(extents: Iterable[Extent]) -> list[bytes]:
    """The bytes of each, read side by side."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(Extent.read, extents))


class Member(NamedTuple):
    name: str
    data: Extent


def list_tar(url: str, start: int = 0) -> Iterator[Member]:
    """The regular files of the uncompressed tar that begins at byte ``start`` of ``url``, by their headers alone.

    Raises:
        UserError: it is no tar, a compressed one, or one cut short (the end of the archive is missing).
    """
    fs, path = file_system(url)
    with fs.open(path, "rb") as file:
        yield from _list(file, url, start)


def _list(file: BinaryIO, url: str, start: int) -> Iterator[Member]:
    file.seek(start)
    if file.read(2) == b"\x1f\x8b":
        raise UserError(f"{url} is compressed, so nothing inside can be read by its place: gunzip it first")
    file.seek(start)
    end = start
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                if info.isreg():
                    yield Member(info.name.removeprefix("./"), Extent(url, info.offset_data, info.size))
                end = tar.offset
                tar.members = []  # it would keep them all
    except tarfile.TarError as error:
        raise UserError(f"{url} is no whole tar ({error}): get it again") from error
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"{url} is cut short, or damaged, at byte {end}: get it again")
