"""Reading one frame: fetch (one ranged read, digest checked), then open (decompress, parse, compare with the manifest).

They are two functions so that a cache can stand between them: nothing is used before ``open_frame`` has checked it,
whatever the source of the bytes. Both are stateless, so any number of threads may call them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import xxhash

from data_sharding.errors import DataError, StorageDown, UserError
from data_sharding.format.manifest import FILE, Manifest, digest_words
from data_sharding.format.shard import RawFrame, Sample, parse_frame
from data_sharding.storage.bad_places import can_be_read, may_be_bad_place
from data_sharding.storage.files import read
from data_sharding.storage.filesystems import file_system, is_local
from data_sharding.storage.retry import CorruptRead, RetriesExhausted, RetryPolicy, call_with_retry
from data_sharding.storage.store import Bytes
from data_sharding.stream.disk_cache import DiskCache

_PAGE = 4096  # bytes that a disk reads at least
_PROBE = 10.0  # seconds in which something else of the dataset must answer


class UnreadableFrame(DataError):
    """A frame that cannot be read: missing, or damaged where it is stored."""


@dataclass(frozen=True)
class FrameReader:
    """Reads frames: with which retries, and through which cache of the node (None: without)."""

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    cache: DiskCache | None = None

    def read(self, manifest: Manifest, f: int) -> RawFrame:
        """Raises as ``fetch_frame`` and ``open_lazily``."""
        if self.cache is None:
            data = fetch_frame(manifest, f, self.retry)
        else:
            data = self.cache.get(
                frame_digest(manifest, f),
                check=lambda data: check_frame(manifest, f, data),
                fetch=lambda: fetch_frame(manifest, f, self.retry),
                policy=self.retry,
            )
        return open_lazily(manifest, f, data)


def read_frame(manifest: Manifest, f: int) -> list[Sample]:
    """The samples of frame ``f``, in the order of rows ``frame_first[f] .. frame_first[f+1]-1``.

    Raises as ``fetch_frame`` and ``open_frame``.
    """
    return open_frame(manifest, f, fetch_frame(manifest, f))


def fetch_frame(manifest: Manifest, f: int, policy: RetryPolicy | None = None) -> bytes:
    """The compressed bytes of frame ``f``, equal to their digest.

    Raises:
        UnreadableFrame: the frame is missing or damaged, or its place on the disk cannot be read.
        StorageDown: the storage does not answer until the deadline, so the frame is not at fault.
        Cancelled: see RetryPolicy.
    """
    start = int(manifest.frame_offset[f])

    def checked(data: bytes) -> bytes:
        check_frame(manifest, f, data)
        return data

    try:
        return call_with_retry(
            policy or RetryPolicy(),
            manifest.frame_url(f),
            "cat_file",
            start=start,
            end=start + int(manifest.frame_bytes[f]),
            check=checked,
        )
    except FileNotFoundError as error:
        if not _has_manifest(manifest):  # it is not mounted, perhaps
            raise _down(manifest, error) from error
        raise _unreadable(manifest, f, "the shard is missing") from error
    except (CorruptRead, OSError) as error:
        raise _unreadable(manifest, f, str(error)) from error
    except RetriesExhausted as error:
        if _is_bad_place(manifest, f, error.__cause__):
            raise _unreadable(manifest, f, str(error)) from error
        raise _down(manifest, error) from error


def _has_manifest(manifest: Manifest) -> bool:
    """Whether the rest of the dataset is there."""
    try:
        read(f"{manifest.url}/{FILE}", deadline=_PROBE)
    except (FileNotFoundError, UserError):  # StorageDown among them
        return False
    return True


def _is_bad_place(manifest: Manifest, f: int, error: BaseException | None) -> bool:
    """Whether the frame is at fault, not the storage: wrong bytes, or a part of a disk that cannot be read (EIO) in a
    file whose other end can. Everything else says nothing of the frame: a busy server, say, would refuse any."""
    if isinstance(error, CorruptRead):
        return True
    fs, path = file_system(manifest.frame_url(f))
    if not is_local(fs) or not may_be_bad_place(error):
        return False
    begin, size = int(manifest.frame_offset[f]), int(manifest.frame_bytes[f])
    other = 0 if begin else -1  # behind the last frame is the end of the tar
    # The frame again after the other: an outage may just have ended.
    return can_be_read(path, [other]) and not can_be_read(path, [*range(begin, begin + size, _PAGE), begin + size - 1])


def _down(manifest: Manifest, error: Exception) -> StorageDown:
    return StorageDown(
        f"{manifest.url} cannot be reached ({error}): check the storage, the network and the credentials, then start "
        "the run again; it continues from its last commit"
    )


def check_frame(manifest: Manifest, f: int, data: Bytes) -> None:
    """Raises CorruptRead if ``data`` is not frame ``f`` as it was written."""
    found, expected = xxhash.xxh3_128_hexdigest(data), int(manifest.frame_bytes[f])
    if len(data) != expected:
        raise CorruptRead(f"{len(data)} of its {expected} bytes were read", found)
    if digest_words(found) != tuple(manifest.frame_digest[f].tolist()):
        raise CorruptRead("its bytes do not match their digest", found)


def frame_digest(manifest: Manifest, f: int) -> str:
    """xxh3_128 of the compressed frame, 32 hex digits."""
    low, high = manifest.frame_digest[f].tolist()
    return f"{high:016x}{low:016x}"


def open_frame(manifest: Manifest, f: int, data: Bytes, parse: Callable = parse_frame) -> list:
    """The samples in ``data``, fetched as frame ``f``, as ``parse`` returns them. Raises UnreadableFrame."""
    try:
        check_frame(manifest, f, data)
        samples = parse(data, int(manifest.frame_raw_bytes[f]), manifest.header.latent_channels)
    except (CorruptRead, ValueError) as error:
        raise _unreadable(manifest, f, str(error)) from error
    rows = slice(int(manifest.frame_first[f]), int(manifest.frame_first[f + 1]))
    for found, column in (
        ([s.id for s in samples], "sample_id"),
        ([s.label for s in samples], "label"),
        ([s.size for s in samples], "size"),
    ):
        if not np.array_equal(found, getattr(manifest, column)[rows]):
            raise _unreadable(manifest, f, f"its samples disagree with the manifest's {column}")
    return samples


def open_lazily(manifest: Manifest, f: int, data: bytes) -> RawFrame:
    """As ``open_frame``, but parses no array: only the digest and the ids are compared. Raises UnreadableFrame."""
    try:
        check_frame(manifest, f, data)
        frame = RawFrame(data, int(manifest.frame_raw_bytes[f]), manifest.header.latent_channels)
    except (CorruptRead, ValueError) as error:
        raise _unreadable(manifest, f, str(error)) from error
    if not np.array_equal(frame.ids, manifest.sample_id[manifest.frame_first[f] : manifest.frame_first[f + 1]]):
        raise _unreadable(manifest, f, "its samples disagree with the manifest's sample_id")
    return frame


def _unreadable(manifest: Manifest, f: int, cause: str) -> UnreadableFrame:
    return UnreadableFrame(
        f"{manifest.frame_url(f)}, frame {f} (at byte {manifest.frame_offset[f]}): {cause}; restore the shard from a "
        "copy or write the dataset again (`fitv2 shard verify` lists all damage)"
    )
