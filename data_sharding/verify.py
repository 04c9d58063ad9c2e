"""Whether every byte of a dataset is what was written. Collects all problems, not only the first."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import fsspec
import numpy as np
import xxhash

from data_sharding.errors import DataError
from data_sharding.frames import open_frame
from data_sharding.manifest import Manifest
from data_sharding.shard import END_OF_ARCHIVE, decompress


@dataclass(frozen=True)
class VerifyReport:
    """``problems`` holds one sentence each, naming file, frame and cause; empty if all is well. ``bytes`` were read."""

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


def verify(url: str) -> VerifyReport:
    """Reads all of the dataset at ``url``: columns, shards, frames and samples against the manifest, and ids unique.

    Shards are streamed, a frame at a time, in a thread for each core.
    """
    started = time.monotonic()
    try:
        manifest = Manifest.load(url)
    except DataError as error:  # without a manifest there is nothing to compare the shards with
        return VerifyReport(url, 0, 0, 0, 0, time.monotonic() - started, (str(error),))
    problems = _duplicates(manifest) + _strays(manifest)
    read = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for size, found in pool.map(lambda shard: _verify_shard(manifest, shard), range(len(manifest.shards))):
            read += size
            problems += found
    totals = manifest.header.totals
    return VerifyReport(
        url=manifest.url,
        shards=len(manifest.shards),
        frames=totals["frames"],
        samples=totals["samples"],
        bytes=read,
        seconds=time.monotonic() - started,
        problems=tuple(problems),
    )


def _verify_shard(manifest: Manifest, shard: int) -> tuple[int, list[str]]:
    """Bytes read, and problems."""
    entry = manifest.shards[shard]
    url = f"{manifest.url}/{entry.name}"
    fs, path = fsspec.core.url_to_fs(url)
    frames = np.searchsorted(manifest.frame_shard, [shard, shard + 1])
    digest, problems, size = xxhash.xxh3_128(), [], 0
    try:
        with fs.open(path, "rb") as file:
            for f in range(*frames):
                data = file.read(int(manifest.frame_bytes[f]))
                digest.update(data)
                size += len(data)
                try:
                    open_frame(manifest, f, data)
                except DataError as error:
                    problems.append(str(error))
            rest = file.read()
    except FileNotFoundError:
        return 0, [f"{url} is missing: restore it from a copy or write the dataset anew"]
    digest.update(rest)
    size += len(rest)
    if size != entry.bytes:
        problems.append(f"{url} is {size} bytes long, not {entry.bytes}: restore it from a copy")
    elif not _is_end(rest):
        problems.append(f"{url}: {len(rest)} bytes after the last frame are not the end of an archive")
    elif digest.hexdigest() != entry.xxh3_128 and not problems:
        problems.append(f"{url}: its bytes do not match the digest in the manifest")
    return size, problems


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
    fs, root = fsspec.core.url_to_fs(manifest.url)
    present = {item["name"].rpartition("/")[2] for item in fs.ls(root, detail=True)}
    unknown = sorted(name for name in present - {s.name for s in manifest.shards} if name.endswith(".tar.zst"))
    return [f"{manifest.url}/{name} is not in the manifest: it belongs to another dataset" for name in unknown]
