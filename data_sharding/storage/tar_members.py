"""The files inside uncompressed tars, as byte ranges: they are read in place, without unpacking.

A tar may hold a file as a link to another one (tar itself writes hard links so): its bytes are those of its target.
"""

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from typing import BinaryIO, NamedTuple

from data_sharding.errors import UserError
from data_sharding.storage.byte_ranges import ByteRange, open_binary
from data_sharding.storage.failures import failure

_MOST_LINKS = 40  # from link to link, as Linux allows


def is_tar_name(name: str) -> bool:
    """Whether a file of this name is taken for an uncompressed tar."""
    return name.lower().endswith(".tar")


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    data: ByteRange


class _Header(NamedTuple):
    """``data`` is None for what is no file that can be read in place; ``reason`` says why. ``link`` is the path of its
    target, "" for a member that is no link; the target of a hard link comes before it in the tar."""

    name: str
    data: ByteRange | None
    reason: str = ""
    link: str = ""
    hard: bool = False


def list_tar(url: str, start: int = 0, unusable: Callable[[str, str], object] = lambda *_: None) -> Iterator[Member]:
    """The files of the uncompressed tar that starts at byte ``start`` of ``url``; reads their headers only.

    ``unusable`` is called with name and reason of each member that is neither a folder nor a file with bytes: devices,
    pipes, sparse files, links to what is not in the tar.

    Raises:
        UserError: there is no such file; it is not a tar, is compressed, or is truncated (its end is missing).
    """
    headers = list(_headers(url, start))
    last: dict[str, int] = {}
    if any(header.link for header in headers):
        last = {posixpath.normpath(header.name): i for i, header in enumerate(headers)}
    before: dict[str, int] = {}
    targets: list[_Header] = []  # as ``headers``, with hard links resolved
    for i, header in enumerate(headers):
        if header.hard:
            at = before.get(header.link)
            header = header if at is None else targets[at]._replace(name=header.name)
        targets.append(header)
        if last:
            before[posixpath.normpath(header.name)] = i
    for header in targets:
        found = _follow(header, targets, last)
        if found.data is not None:
            yield Member(header.name, found.data)
        else:
            unusable(header.name, found.reason)


def first_names(url: str, count: int) -> list[str]:
    """The names of the first members, without reading further. Raises as ``list_tar``."""
    return [header.name for header in islice(_headers(url, 0), count)]


def check_tar(url: str) -> None:
    """Reads the headers of a tar to its end. Raises as ``list_tar``."""
    for _ in _headers(url, 0):
        pass


def _follow(header: _Header, targets: list[_Header], last: dict[str, int]) -> _Header:
    for _ in range(_MOST_LINKS):
        if not header.link or header.hard:
            return header
        if (at := last.get(header.link)) is None:
            break
        header = targets[at]
    return header._replace(data=None, reason="a link to a file that is not in the tar")


def _headers(url: str, start: int) -> Iterator[_Header]:
    """All members but folders."""
    try:
        with open_binary(url) as file:
            yield from _parse(file, url, start)
    except OSError as error:
        raise failure(f"the tar {url}", error) from error


def _parse(file: BinaryIO, url: str, start: int) -> Iterator[_Header]:
    file.seek(start)
    if file.read(2) == b"\x1f\x8b":
        raise UserError(f"{url} is compressed, so its files cannot be read separately: decompress it first (gunzip)")
    file.seek(start)
    end = start
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                if not info.isdir():
                    yield _header(info, url)
                end = tar.offset
                # Else tarfile would keep all headers in memory. typeshed does not list this attribute.
                tar.members = []  # pyrefly: ignore[missing-attribute]
    except tarfile.TarError as error:
        raise UserError(f"{url} is not a complete tar ({error}): download or copy it again") from error
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"{url} is truncated or damaged at byte {end}: download or copy it again")


def _header(info: tarfile.TarInfo, url: str) -> _Header:
    name = info.name.removeprefix("./")
    if info.islnk():
        link = posixpath.normpath(info.linkname)
        return _Header(name, None, "a link to a file that is not before it in the tar", link, hard=True)
    if info.issym():
        return _Header(name, None, link=posixpath.normpath(posixpath.join(posixpath.dirname(name), info.linkname)))
    if info.issparse():
        return _Header(name, None, "a sparse file, whose bytes do not lie together in the tar")
    if not info.isreg():
        return _Header(name, None, "a device, a pipe or another member that is no file")
    return _Header(name, ByteRange(url, info.offset_data, info.size))
