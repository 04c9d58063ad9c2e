"""A file system on which calls fail with an errno, as told, for the paths with some text in them."""

import builtins
import fcntl
import io
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

_POINTS = {"read": "read", "readinto": "read", "write": "write"}  # methods of a file


class FaultyDisk:
    """``fail(number, "shard", "read")``: from now on, reads of paths with "shard" in them raise OSError(number);
    ``times`` of them, then all is well. Points: open, read, write, stat, link, replace, fsync, flock. ``place``: only
    reads of some of these bytes fail."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.number, self.part, self.points, self.left, self.met = 0, "", (), 0.0, 0
        self.place: range | None = None
        opened = self._opener(builtins.open)
        for owner in (builtins, io):
            patch.setattr(owner, "open", opened)
        for name, point, at in (
            ("open", "open", 0),
            ("stat", "stat", 0),
            ("link", "link", 1),
            ("replace", "replace", 1),
        ):
            patch.setattr(os, name, self._failing(getattr(os, name), point, at))
        patch.setattr(os, "fsync", lambda file: self.touch(file, "fsync"))  # nobody cuts the power
        patch.setattr(fcntl, "flock", self._failing(fcntl.flock, "flock", 0))

    def fail(
        self, number: int, part: str, *points: str, times: float = float("inf"), place: range | None = None
    ) -> None:
        self.number, self.part, self.points, self.left, self.met = number, part, points, times, 0
        self.place = place

    def touch(self, path: object, point: str) -> None:
        if point in self.points and self.left > 0 and self.part in _name(path):
            self.left, self.met = self.left - 1, self.met + 1
            raise OSError(self.number, os.strerror(self.number), _name(path))

    def _failing(self, call: Callable, point: str, at: int) -> Callable:
        def act(*args: Any, **kw: Any) -> Any:
            self.touch(args[at], point)
            return call(*args, **kw)

        return act

    def _opener(self, call: Callable) -> Callable:
        def act(path: Any, *args: Any, **kw: Any) -> Any:
            self.touch(path, "open")
            return _File(call(path, *args, **kw), self, path) if self.part in _name(path) else call(path, *args, **kw)

        return act


class _File:
    """An open file whose reads and writes fail as told."""

    def __init__(self, file: Any, disk: FaultyDisk, path: object) -> None:
        self._file, self._disk, self._path = file, disk, path

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._file, name)
        return partial(self._act, found, _POINTS[name]) if name in _POINTS else found

    def _act(self, call: Callable, point: str, *args: Any) -> Any:
        if point != "read" or self._disk.place is None or self._reads(self._disk.place, *args):
            self._disk.touch(self._path, point)
        return call(*args)

    def _reads(self, place: range, size: Any = -1) -> bool:
        """``size``: how many bytes, -1 for all; or a buffer for them."""
        begin, size = self._file.tell(), size if isinstance(size, int) else len(size)
        return begin < place.stop and (size < 0 or place.start < begin + size)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)


def _name(path: object) -> str:
    """Of a path, or of an open file's number or object."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    return path._path if isinstance(path, _File) else str(path)
