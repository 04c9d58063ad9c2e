"""The files below a folder, local or on an object store, by their path in it.

A local folder is walked as timm and torchvision do: links to files and folders are followed. What cannot be listed or
read is left out by name (see ``findings.py``), and the rest is listed: a link to nothing or back to a folder above it,
a pipe, a device, a folder or file without permission, a name that is not UTF-8.
"""

import errno
import os
import stat
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_sharding.errors import StorageDown, UserError
from data_sharding.storage.byte_ranges import ByteRange
from data_sharding.storage.files import fs_call
from data_sharding.storage.filesystems import file_system, is_local
from data_sharding.write.findings import Findings, in_system_folder, is_system_folder, is_utf8, printable, suffix_of

_NOTHING = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENXIO}
_FORBIDDEN = {errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Listing:
    """``files`` by key, the path below the folder. ``folders`` are the names in the folder itself that are followed,
    each with what identifies the folder (None on an object store). ``linked`` are groups of keys that are one and the
    same file, at least one of them by a link to it or to a folder above it. Hard links alone are files of their own."""

    files: dict[str, ByteRange]
    folders: dict[str, tuple[int, int] | None]
    linked: list[list[str]]


class Top(NamedTuple):
    """What lies in a folder itself: each file with the reason why it cannot be read, "" if it can; and folders."""

    files: dict[str, str]
    folders: list[str]
    left_aside: list[str]


def list_folder(src: str, suffixes: tuple[str, ...], findings: Findings) -> Listing:
    """The files below ``src`` whose names end in one of ``suffixes`` (given in lower case), in any case.

    Raises:
        UserError: there is no folder at ``src``.
        StorageDown: the storage does not answer.
    """
    fs, root = file_system(src)
    root = root.rstrip("/")
    prefix = fs.unstrip_protocol(root).rstrip("/")
    if not is_local(fs):
        return _list_store(src, root, prefix, suffixes, findings)
    refuse_unless_folder(src)
    walk = _Walk(root or "/", suffixes, findings)
    files = {key: ByteRange(f"{prefix}/{key}", None, size) for key, size in walk.files()}
    return Listing(files, walk.top, walk.identities.linked(list(files)))


def list_top(src: str) -> Top:
    """Lists the folder ``src`` without what is below it. Raises as ``list_folder``."""
    refuse_unless_folder(src)
    fs, root = file_system(src)
    kinds: dict[str, str] = {}
    if not is_local(fs):
        for item in fs_call(src, "ls", detail=True):
            kinds[item["name"].rstrip("/").rpartition("/")[2]] = item["type"]
    else:
        with os.scandir(root) as entries:
            kinds = {entry.name: _kind(entry) for entry in entries}
    folders = sorted(name for name, kind in kinds.items() if kind == "directory")
    files = {name: "" if kind == "file" else kind for name, kind in kinds.items() if kind != "directory"}
    return Top(
        files, [name for name in folders if not is_system_folder(name)], [n for n in folders if is_system_folder(n)]
    )


def _kind(entry: os.DirEntry) -> str:
    """ "directory", "file", or why it is neither."""
    try:
        if entry.is_dir():
            return "directory"
        if entry.is_file():
            return "file"
    except OSError as error:
        return str(error.strerror)
    return "it is a link to nothing" if entry.is_symlink() else "it is a pipe, a socket or a device"


def refuse_unless_folder(src: str) -> None:
    """Raises UserError with the reason if ``src`` is no folder that can be opened."""
    fs, path = file_system(src)
    if not is_local(fs):
        if not fs_call(src, "isdir"):
            raise UserError(f"there is no folder at {src}: check the URL, and give the folder that holds the images")
        return
    try:
        os.scandir(path).close()
    except NotADirectoryError as error:
        if not os.path.exists(path):
            raise UserError(f"there is nothing at {src}: a part of this path is a file, not a folder") from error
        raise UserError(
            f"{src} is a file, not a folder: give a folder with one folder of images per class, a .tar, or a folder "
            "with tars (unpack other archives first)"
        ) from error
    except FileNotFoundError as error:
        link = os.path.islink(path)
        raise UserError(
            f"{src} is a link to {os.readlink(path)}, where there is nothing: correct the link"
            if link
            else f"there is nothing at {src}: check the path"
        ) from error
    except OSError as error:
        raise UserError(f"the folder {src} cannot be opened: {error.strerror}") from error


class _Identities:
    """Of files, in the order in which they are added: arrays, since there may be many millions."""

    def __init__(self) -> None:
        self._device, self._inode, self._by_link = array("Q"), array("Q"), array("B")

    def add(self, found: os.stat_result, by_link: bool) -> None:
        """``by_link``: a link to the file or to a folder above it was followed."""
        self._device.append(found.st_dev)
        self._inode.append(found.st_ino)
        self._by_link.append(by_link)

    def linked(self, keys: list[str]) -> list[list[str]]:
        """See ``Listing``; ``keys`` are those of the files."""
        device, inode = (np.frombuffer(ids, np.uint64) for ids in (self._device, self._inode))
        by_link = np.frombuffer(self._by_link, bool)
        if not by_link.any():
            return []
        order = np.lexsort((inode, device))
        differs = (np.diff(device[order]) != 0) | (np.diff(inode[order]) != 0)
        starts = np.concatenate([[0], np.flatnonzero(differs) + 1])
        counts = np.diff([*starts, len(order)])
        wanted = (counts > 1) & np.logical_or.reduceat(by_link[order], starts) & (inode[order[starts]] != 0)
        groups = zip(starts[wanted].tolist(), counts[wanted].tolist(), strict=True)
        return [sorted(keys[i] for i in order[at : at + count].tolist()) for at, count in groups]


class _Walk:
    def __init__(self, root: str, suffixes: tuple[str, ...], findings: Findings):
        self._root, self._suffixes, self._findings = root, suffixes, findings
        self.top: dict[str, tuple[int, int] | None] = {}
        self.identities = _Identities()

    def files(self) -> Iterator[tuple[str, int]]:
        """(key, bytes) of each file, in no order."""
        here = os.stat(self._root)
        waiting = [("", frozenset({(here.st_dev, here.st_ino)}), False)]
        while waiting:
            folder, above, by_link = waiting.pop()
            for entry in self._entries(folder):
                key = f"{folder}{entry.name}"
                if (at := self._folder(entry, key, above)) is None:
                    yield from self._file(entry, key, by_link)
                elif at != _LEFT:
                    waiting.append((f"{key}/", above | {at}, by_link or entry.is_symlink()))
                    if not folder:
                        self.top[entry.name] = at

    def _entries(self, folder: str) -> list[os.DirEntry]:
        try:
            with os.scandir(os.path.join(self._root, folder)) as entries:
                return list(entries)
        except OSError as error:
            if error.errno not in _FORBIDDEN | _NOTHING or not folder:
                raise _down(self._root, folder, error) from error
            self._findings.leave_out(folder, f"the folder cannot be opened: {error.strerror}")
            return []

    def _folder(self, entry: os.DirEntry, key: str, above: frozenset) -> tuple[int, int] | None:
        """What identifies the folder, ``_LEFT`` if it is not to be listed, None if the entry is no folder."""
        try:
            if not entry.is_dir():
                return None
        except OSError:  # such as a link through a folder without permission: `_file` finds the reason
            return None
        if is_system_folder(entry.name):
            self._findings.aside(f"folder {printable(entry.name)}")
        elif not is_utf8(entry.name):
            self._findings.leave_out(f"{key}/", "the folder's name is not UTF-8: rename it")
        else:
            found = entry.stat()
            if (at := (found.st_dev, found.st_ino)) not in above:
                return at
            self._findings.leave_out(f"{key}/", "a link back to a folder above it")
        return _LEFT

    def _file(self, entry: os.DirEntry, key: str, by_link: bool) -> Iterator[tuple[str, int]]:
        self._findings.file(entry.name)
        wanted = entry.name.lower().endswith(self._suffixes)
        if not wanted and not entry.is_symlink():
            self._findings.aside(suffix_of(entry.name))
            return
        try:
            found = entry.stat()
        except OSError as error:  # a link may lead to a folder, so it is named whatever its suffix
            if (reason := _why_unreachable(entry, error)) is None:
                raise _down(self._root, key, error) from error
            self._findings.leave_out(key, reason)
            return
        if not wanted:
            self._findings.aside(suffix_of(entry.name))
        elif reason := _why_unreadable(found, entry):
            self._findings.leave_out(key, reason)
        else:
            self.identities.add(found, by_link or entry.is_symlink())
            yield key, found.st_size


_LEFT = (-1, -1)


def _why_unreachable(entry: os.DirEntry, error: OSError) -> str | None:
    """The reason to leave it out, None if the storage is at fault."""
    if error.errno == errno.ELOOP:
        return "a link that leads back to itself"
    if error.errno in _NOTHING:
        return "a link to nothing" if entry.is_symlink() else "it vanished while the folder was listed"
    return f"it cannot be opened: {error.strerror}" if error.errno in _FORBIDDEN else None


def _why_unreadable(found: os.stat_result, entry: os.DirEntry) -> str:
    """The reason to leave it out, "" if there is none."""
    if not is_utf8(entry.name):
        return "the name is not UTF-8: rename the file"
    if not stat.S_ISREG(found.st_mode):
        return "a pipe, a socket or a device, not a file"
    # Asked only where the mode leaves it open: on a network file system it can cost a request for each file.
    if not found.st_mode & stat.S_IROTH and not os.access(entry.path, os.R_OK):
        return "it cannot be opened: Permission denied"
    return ""


def _down(root: str, key: str, error: OSError) -> StorageDown:
    where = printable(os.path.join(root, key))
    return StorageDown(f"{where} cannot be listed: {error.strerror}; check the storage, then run the command again")


def _list_store(src: str, root: str, prefix: str, suffixes: tuple[str, ...], findings: Findings) -> Listing:
    names = {
        item["name"].rstrip("/").rpartition("/")[2]
        for item in fs_call(src, "ls", detail=True)
        if item["type"] == "directory"
    }
    files = {}
    for path, info in fs_call(src, "find", detail=True).items():
        key = path[len(root) + 1 :]
        findings.file(key)
        if in_system_folder(key, findings):
            continue
        if key.lower().endswith(suffixes):
            files[key] = ByteRange(f"{prefix}/{key}", None, info["size"])
        else:
            findings.aside(suffix_of(key))
    return Listing(files, dict.fromkeys(name for name in names if not is_system_folder(name)), [])
