"""Verifies every byte of a dataset. Collects all problems, not only the first."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash

from data_sharding.errors import DataError
from data_sharding.format.manifest import Manifest
from data_sharding.format.shard import END_OF_ARCHIVE, decompress, scan_frame
from data_sharding.storage.byte_ranges import read_range
from data_sharding.storage.files import fs_call
from data_sharding.storage.store import Bytes
from data_sharding.stream.frames import fetch_frame, open_frame
from data_sharding.worker_pool import cores, run_tasks

_SPAN = 1 << 25  # bytes read at once
_WORTH_PROCESSES = 1 << 28  # bytes of a dataset below which starting processes takes longer than the work


@dataclass(frozen=True)
class VerifyReport:
    """``problems`` has a sentence per problem, with file, frame and cause; it is empty if all is well. ``bytes`` is the
    number of bytes read."""

    url: str
    shards: int
    frames: int
    samples: int
    bytes: int
    seconds: float
    problems: tuple[str, ...]

    @property
    def mb_per_second(self) -> float:
        """Megabytes (10**6) of stored data a second."""
        return self.bytes / 1e6 / self.seconds


@dataclass(frozen=True)
class _ShardTask:
    """``digest`` is the manifest's: each process loads the manifest itself, once."""

    url: str
    digest: str
    shard: int


def verify(url: str) -> VerifyReport:
    """Reads all of the dataset at ``url``: columns, shards, frames and samples against the manifest, and ids unique.

    Uses one process per core, each with one shard at a time.
    """
    started = time.monotonic()
    try:
        manifest = Manifest.load(url)
    except DataError as error:  # without a manifest there is nothing to compare the shards with
        return VerifyReport(url, 0, 0, 0, 0, time.monotonic() - started, (str(error),))
    found: dict[int, list[str]] = {}
    read = 0

    def collect(shard: int, size: int, problems: list[str]) -> None:
        nonlocal read
        found[shard] = problems
        read += size

    totals = manifest.header.totals
    workers = min(cores(), len(manifest.shards))
    if workers == 1 or totals["bytes"] < _WORTH_PROCESSES:
        for shard in range(len(manifest.shards)):
            collect(shard, *_verify_shard(manifest, shard))
    else:
        tasks = [_ShardTask(manifest.url, manifest.digest, shard) for shard in range(len(manifest.shards))]
        run_tasks(tasks, _verify_task, workers, collect)
    problems = _duplicates(manifest) + _strays(manifest)
    problems += [problem for shard in sorted(found) for problem in found[shard]]
    return VerifyReport(
        url=manifest.url,
        shards=len(manifest.shards),
        frames=totals["frames"],
        samples=totals["samples"],
        bytes=read,
        seconds=time.monotonic() - started,
        problems=tuple(problems),
    )


def _verify_task(task: _ShardTask, report: Callable) -> None:
    report(task.shard, *_verify_shard(_manifest(task.url, task.digest), task.shard))


@lru_cache(maxsize=1)
def _manifest(url: str, digest: str) -> Manifest:
    manifest = Manifest.load(url)
    if manifest.digest != digest:
        raise DataError(f"{url} was written again during the verification: verify it again")
    return manifest


def _verify_shard(manifest: Manifest, shard: int) -> tuple[int, list[str]]:
    """(bytes read, problems) of one shard."""
    entry = manifest.shards[shard]
    url = f"{manifest.url}/{entry.name}"
    try:
        size = fs_call(url, "size")
    except FileNotFoundError:
        return 0, [f"{url} is missing: restore it from a copy or write the dataset again"]
    digest, problems, end = xxhash.xxh3_128(), [], 0
    for frames, start, stop in _spans(manifest, shard):
        data = memoryview(read_range(url, start, min(stop, size)) if start < size else b"")
        for f in frames:
            at = int(manifest.frame_offset[f]) - start
            stored = data[at : at + int(manifest.frame_bytes[f])]  # of a memoryview: copies nothing
            try:
                open_frame(manifest, f, stored, scan_frame)
            except DataError:
                stored, found = _read_again(manifest, f, stored)
                problems += found
            digest.update(stored)
        end = stop
    if size != entry.bytes:
        problems.append(f"{url} is {size} bytes long, not {entry.bytes}: restore it from a copy")
        return min(end, size), problems
    rest = read_range(url, end, size)
    digest.update(rest)
    if not _is_end(rest):
        problems.append(
            f"{url}: {len(rest)} bytes after the last frame are not the end of a tar archive: restore it from a copy"
        )
    elif digest.hexdigest() != entry.xxh3_128 and not problems:
        problems.append(f"{url}: its bytes do not match the digest in the manifest: restore it from a copy")
    return size, problems


def _read_again(manifest: Manifest, f: int, seen: Bytes) -> tuple[Bytes, list[str]]:
    """(bytes, problems) of a wrong frame, read once more: the error may be one of the transfer, not of the storage."""
    try:
        data = fetch_frame(manifest, f)
        open_frame(manifest, f, data, scan_frame)
    except DataError as error:
        return seen, [str(error)]
    return data, []


def _spans(manifest: Manifest, shard: int) -> Iterator[tuple[range, int, int]]:
    """Consecutive whole frames, about ``_SPAN`` bytes at a time: (frames, first byte, end)."""
    first, last = np.searchsorted(manifest.frame_shard, [shard, shard + 1]).tolist()
    starts, ends = manifest.frame_offset, manifest.frame_offset + manifest.frame_bytes
    while first < last:
        start = int(starts[first])
        after = max(int(np.searchsorted(ends[first:last], start + _SPAN, "right")) + first, first + 1)
        yield range(first, after), start, int(ends[after - 1])
        first = after


def _is_end(rest: bytes) -> bool:
    try:
        return decompress(rest, len(END_OF_ARCHIVE)) == END_OF_ARCHIVE
    except ValueError:
        return False


def _duplicates(manifest: Manifest) -> list[str]:
    ids, counts = np.unique(manifest.sample_id, return_counts=True)
    return [
        f"{manifest.url}: sample id {sample:016x} occurs {count} times: the same image was written twice"
        for sample, count in zip(ids[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True)
    ]


def _strays(manifest: Manifest) -> list[str]:
    present = {item["name"].rpartition("/")[2] for item in fs_call(manifest.url, "ls", detail=True)}
    unknown = sorted(name for name in present - {s.name for s in manifest.shards} if name.endswith(".tar.zst"))
    return [f"{manifest.url}/{name} is not in the manifest: it belongs to another dataset" for name in unknown]
