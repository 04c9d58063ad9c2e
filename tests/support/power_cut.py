"""What a power cut would leave: a file system keeps for certain only what fsync was called for, the bytes of a file and
the names in a folder each by themselves."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest


class PowerCut:
    """Notes every fsync from now on. ``left()``: the files below ``root`` that a power cut now would leave, with the
    bytes of each."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = root.stat().st_ino
        self._names: dict[int, dict[str, int]] = {}  # of a folder, by inodes
        self._sizes: dict[int, int] = {}  # of a file
        monkeypatch.setattr(os, "fsync", self._fsync)

    def _fsync(self, file: int) -> None:
        status = os.fstat(file)
        self._names.pop(status.st_ino, None)  # the number of what was removed is given to another one
        self._sizes.pop(status.st_ino, None)
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(file) as entries:
                self._names[status.st_ino] = {entry.name: entry.inode() for entry in entries}
        else:
            self._sizes[status.st_ino] = status.st_size

    def left(self) -> dict[str, int]:
        return dict(self._below(self._root, ""))

    def _below(self, folder: int, prefix: str) -> Iterator[tuple[str, int]]:
        for name, inode in self._names.get(folder, {}).items():
            if inode in self._sizes:
                yield f"{prefix}{name}", self._sizes[inode]
            else:
                yield from self._below(inode, f"{prefix}{name}/")
