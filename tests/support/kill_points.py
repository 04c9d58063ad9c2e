"""A process that dies, or stops, at its k-th operation on storage: in between no process can be killed otherwise.

Operations are what changes a local disk (each write may be torn: half of it is done), or a request to S3.
"""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import data_sharding.storage.atomic_write as atomic_write_module

_CHANGES = ("mkdir", "fsync", "link", "replace", "unlink", "rmdir")
_READS = ("get_", "head_", "list_")


class KillPoint:
    """Counts operations from ``arm`` on; raises ``number`` in this process just before operation ``at`` (from 0)."""

    def __init__(self, number: signal.Signals = signal.SIGKILL) -> None:
        self._number, self._at, self.count = number, None, None

    def arm(self, at: int | None) -> None:
        self._at, self.count = at, 0

    def __call__(self, torn: Callable[[], Any] = lambda: None) -> None:
        if self.count is None:
            return
        if self.count == self._at:
            torn()
            signal.pthread_kill(threading.get_ident(), self._number)  # this thread, which writes, stops here
        self.count += 1


def watch_disk(kill_point: KillPoint) -> None:
    """Every change of the local disk by this process's Python asks ``kill_point`` first."""
    for name in _CHANGES:
        setattr(os, name, _first(kill_point, getattr(os, name)))
    atomic_write_module.open = lambda *args, **kw: _File(kill_point, open(*args, **kw))  # noqa: SIM115


def watch_s3(kill_point: KillPoint, reads: bool) -> None:
    """Every request to S3 asks ``kill_point`` first; unless ``reads``, only those that change something."""
    from s3fs import S3FileSystem

    real = S3FileSystem._call_s3

    async def call(self, method, *args, **kw):
        if reads or not method.startswith(_READS):
            kill_point()
        return await real(self, method, *args, **kw)

    S3FileSystem._call_s3 = call


def _first(kill_point: KillPoint, real: Callable) -> Callable:
    def act(*args, **kw):
        kill_point()
        return real(*args, **kw)

    return act


class _File:
    def __init__(self, kill_point: KillPoint, file) -> None:
        self._kill_point, self._file = kill_point, file

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data) -> None:
        def half() -> None:
            self._file.write(memoryview(data)[: len(data) // 2])
            self._file.flush()

        self._kill_point(half)
        self._file.write(data)
        self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
