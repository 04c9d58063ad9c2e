"""Unpacks compressed and split archives to plain tars, whose files several processes can then read in any order."""

import gzip
import io
import os
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from fsspec.implementations.local import LocalFileSystem

from data_sharding.errors import UserError
from data_sharding.storage.atomic_write import atomic_write
from data_sharding.storage.byte_ranges import open_binary
from data_sharding.storage.failures import as_sentence
from data_sharding.storage.files import exists, put, read
from data_sharding.storage.filesystems import file_system
from data_sharding.storage.tar_members import check_tar
from data_sharding.worker_pool import Progress, progress_bar, run_tasks, slurm_task

_BLOCK = 1 << 22
_HEARTBEAT = 5.0  # seconds between the heartbeats of a task that unpacks
_TAKEOVER = 60.0  # seconds without one, after which another task takes over


@dataclass(frozen=True)
class Archive:
    """The files of ``parts``, in order, are one archive, to be unpacked into the local file ``tar``."""

    name: str
    parts: tuple[tuple[str, int], ...]
    tar: str
    mine: bool = True

    @property
    def bytes(self) -> int:
        """Of all parts."""
        return sum(size for _, size in self.parts)


def unpack(archives: list[Archive], workers: int, progress: bool) -> None:
    """Creates every ``tar`` that does not exist. Of several Slurm tasks, each unpacks its own and waits for the rest.

    Raises:
        UserError: an archive is damaged or ends too early, or ``tar`` is not on a local or shared file system.
    """
    todo = [archive for archive in archives if not exists(archive.tar)]
    if not todo:
        return
    if not isinstance(file_system(todo[0].tar)[0], LocalFileSystem):
        raise UserError(
            f"{todo[0].name} is an archive that must be unpacked first, which needs a local or shared file system: "
            "unpack it with tar and import the folder, or write the dataset to such a file system"
        )
    index, count = slurm_task()
    tasks = [replace(a, mine=i % count == index) for i, a in enumerate(archives) if a in todo]
    tasks.sort(key=lambda archive: not archive.mine)
    with progress_bar(sum(a.bytes for a in tasks), 0, progress, "B unpacked", unit_scale=True) as bar:
        run_tasks(tasks, _unpack, min(workers, len(tasks)), lambda count, fresh: bar.update(count))


def _unpack(archive: Archive, progress: Progress) -> None:
    if not archive.mine and _unpacked_by_another(archive):
        progress(archive.bytes, False)
        return
    fs, path = file_system(archive.tar)
    with as_sentence(path):
        fs.makedirs(os.path.dirname(path), exist_ok=True)
    # Named by the task, so that a task that is started again reuses the space.
    temporary = Path(f"{path}.{slurm_task()[0]}.tmp")
    beat, count = time.monotonic(), 0
    with (
        _Joined([url for url, _ in archive.parts]) as parts,
        as_sentence(path),
        atomic_write(path, durable=True, temporary=temporary) as out,
    ):
        stream = gzip.GzipFile(fileobj=parts) if parts.peek(2)[:2] == b"\x1f\x8b" else parts
        try:
            while block := stream.read(_BLOCK):
                out.write(block)
                progress(parts.tell() - count, True)
                count = parts.tell()
                if time.monotonic() - beat > _HEARTBEAT:
                    beat = time.monotonic()
                    put(f"{archive.tar}.beat", str(count).encode())
        except EOFError as error:
            raise UserError(f"{archive.name} ends too early: its last part is missing or incomplete") from error
        except (zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{archive.name} is damaged ({error}): download it again") from error
        out.flush()
        check_tar(str(temporary))  # a tar counts as unpacked only if it can be read to its end


def _unpacked_by_another(archive: Archive) -> bool:
    """Waits until another task has unpacked it (True), or has sent no heartbeat for too long (False)."""
    last, since = b"", time.monotonic()
    while not exists(archive.tar):
        time.sleep(min(1.0, _TAKEOVER / 10))
        heartbeat = read(f"{archive.tar}.beat") if exists(f"{archive.tar}.beat") else b""
        if heartbeat != last:
            last, since = heartbeat, time.monotonic()
        if time.monotonic() - since > _TAKEOVER:
            return False
    return True


class _Joined(io.BufferedReader):
    """Several files, read as one."""

    def __init__(self, urls: list[str]):
        super().__init__(_RawJoined(urls), buffer_size=_BLOCK)


class _RawJoined(io.RawIOBase):
    def __init__(self, urls: list[str]):
        self._urls = urls[::-1]
        self._opened: tuple[str, BinaryIO] | None = None
        self._at = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        while self._opened or self._urls:
            url, file = self._opened = self._opened or _open(self._urls.pop())
            with as_sentence(url):
                data = file.read(len(buffer))
            if data:
                buffer[: len(data)] = data
                self._at += len(data)
                return len(data)
            file.close()
            self._opened = None
        return 0


def _open(url: str) -> tuple[str, BinaryIO]:
    with as_sentence(url):
        return url, open_binary(url)
