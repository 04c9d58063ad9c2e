"""Compressed and cut archives to plain tars, whose files can then be read in any order, by several processes."""

import gzip
import io
import os
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from data_sharding.errors import UserError
from data_sharding.storage.atomic_write import atomic_write
from data_sharding.storage.byte_ranges import exists, list_tar, open_binary
from data_sharding.storage.files import put, read
from data_sharding.storage.filesystems import file_system
from data_sharding.worker_pool import Progress, progress_bar, run_tasks, slurm_task

_BLOCK = 1 << 22
_BEAT = 5.0  # seconds between signs of life
_PATIENCE = 60.0  # seconds without one, after which another task takes over


@dataclass(frozen=True)
class Archive:
    """The files of ``parts``, in order, are one archive, to be unpacked into the local file ``tar``."""

    name: str
    parts: tuple[tuple[str, int], ...]
    tar: str
    mine: bool = True

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.parts)


def unpack(archives: list[Archive], workers: int, progress: bool) -> None:
    """Makes every ``tar`` that is not there yet. Of several Slurm tasks, each unpacks its own and waits for the rest.

    Raises:
        UserError: an archive is damaged or ends too early, or ``tar`` is not on a local or shared file system.
    """
    todo = [archive for archive in archives if not exists(archive.tar)]
    if not todo:
        return
    if not isinstance(file_system(todo[0].tar)[0], LocalFileSystem):
        raise UserError(
            f"{todo[0].name} must be unpacked to be read, which needs a file system: unpack it with tar and import the "
            "folder, or write to a file system first"
        )
    place, count = slurm_task()
    tasks = [replace(a, mine=i % count == place) for i, a in enumerate(archives) if a in todo]
    tasks.sort(key=lambda archive: not archive.mine)
    with progress_bar(sum(a.bytes for a in tasks), 0, progress, "B unpacked", unit_scale=True) as bar:
        run_tasks(tasks, _unpack, min(workers, len(tasks)), lambda count, fresh: bar.update(count))


def _unpack(archive: Archive, progress: Progress) -> None:
    if not archive.mine and _others_work(archive):
        progress(archive.bytes, False)
        return
    fs, path = file_system(archive.tar)
    fs.makedirs(os.path.dirname(path), exist_ok=True)
    # Of this task's name, so that one that starts again reuses the space.
    temporary = Path(f"{path}.{slurm_task()[0]}.tmp")
    beat, count = time.monotonic(), 0
    with (
        _Joined([url for url, _ in archive.parts]) as parts,
        atomic_write(path, durable=True, temporary=temporary) as out,
    ):
        stream = gzip.GzipFile(fileobj=parts) if parts.peek(2)[:2] == b"\x1f\x8b" else parts
        try:
            while block := stream.read(_BLOCK):
                out.write(block)
                progress(parts.tell() - count, True)
                count = parts.tell()
                if time.monotonic() - beat > _BEAT:
                    beat = time.monotonic()
                    put(f"{archive.tar}.beat", str(count).encode())
        except EOFError as error:
            raise UserError(f"{archive.name} ends too early: its last part is missing, or is not whole") from error
        except (zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{archive.name} is damaged ({error}): get it again") from error
        out.flush()
        for _ in list_tar(str(temporary)):  # nothing is taken for unpacked that cannot be read to its end
            pass


def _others_work(archive: Archive) -> bool:
    """Waits until another task has unpacked it: True; or until that one gives no sign of life any more: False."""
    last, since = b"", time.monotonic()
    while not exists(archive.tar):
        time.sleep(min(1.0, _PATIENCE / 10))
        sign = read(f"{archive.tar}.beat") if exists(f"{archive.tar}.beat") else b""
        if sign != last:
            last, since = sign, time.monotonic()
        if time.monotonic() - since > _PATIENCE:
            return False
    return True


class _Joined(io.BufferedReader):
    """Files one after the other, as one."""

    def __init__(self, urls: list[str]):
        super().__init__(_RawJoined(urls), buffer_size=_BLOCK)


class _RawJoined(io.RawIOBase):
    def __init__(self, urls: list[str]):
        self._urls = urls[::-1]
        self._file = None
        self._at = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        while True:
            if self._file is None:
                if not self._urls:
                    return 0
                self._file = open_binary(self._urls.pop())
            if data := self._file.read(len(buffer)):
                buffer[: len(data)] = data
                self._at += len(data)
                return len(data)
            self._file.close()
            self._file = None
