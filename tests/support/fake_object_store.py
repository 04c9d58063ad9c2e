"""An object store in memory, at fake://, that misbehaves as told: faults of one request each, in order."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import fsspec
from fsspec.asyn import AsyncFileSystem

Fault = Callable[[bytes], bytes] | Exception | float


class FakeStore(AsyncFileSystem):
    """``faults``: an exception to raise, a function of the body, or seconds to hang."""

    protocol = "fake"
    objects: dict[str, bytes] = {}
    faults: list[Fault] = []
    forever: Fault | None = None  # once ``faults`` are used up
    reads: list[tuple[str, int | None, int | None]] = []
    only = ""  # faults hit paths with this in them

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs) -> bytes:
        path = self._strip_protocol(path)
        self.reads.append((path, start, end))
        if path not in self.objects:
            raise FileNotFoundError(path)
        body = self.objects[path][start:end]
        fault = None
        if self.only in path:
            fault = self.faults.pop(0) if self.faults else type(self).forever
        if isinstance(fault, Exception):
            raise fault
        if isinstance(fault, float):
            await asyncio.sleep(fault)
        return fault(body) if callable(fault) else body


def serve(folder: str) -> str:
    """Puts a folder's files into a clean store; gives its URL."""
    FakeStore.objects = {f"set/{p.relative_to(folder)}": p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    FakeStore.faults, FakeStore.forever, FakeStore.reads, FakeStore.only = [], None, [], ".tar.zst"
    return "fake://set"


fsspec.register_implementation("fake", FakeStore, clobber=True)
