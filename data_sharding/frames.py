"""Reading one frame: fetch (one ranged read), then open (digest, decompress, parse, compare with the manifest).

The two halves are apart so that a cache or a prefetcher can stand between them: nothing is used before ``open_frame``
has checked it, whoever delivered the bytes. Both keep no state, so any number of threads may call them.
"""

import fsspec
import numpy as np
import xxhash

from data_sharding.errors import DataError
from data_sharding.manifest import Manifest, digest_words
from data_sharding.shard import Sample, parse_frame


def read_frame(manifest: Manifest, f: int) -> list[Sample]:
    """The samples of frame ``f``, in the order of rows ``frame_first[f] .. frame_first[f+1]-1``.

    Raises:
        DataError: the shard is missing or short, or the frame does not match its digest or the manifest.
    """
    return open_frame(manifest, f, fetch_frame(manifest, f))


def fetch_frame(manifest: Manifest, f: int) -> bytes:
    """The compressed bytes of frame ``f``, unchecked but for the shard's existence."""
    start = int(manifest.frame_offset[f])
    fs, path = fsspec.core.url_to_fs(manifest.frame_url(f))
    try:
        return fs.cat_file(path, start=start, end=start + int(manifest.frame_bytes[f]))
    except FileNotFoundError as error:
        raise _damaged(manifest, f, "the shard is missing") from error


def open_frame(manifest: Manifest, f: int, data: bytes) -> list[Sample]:
    """The samples in ``data``, which someone fetched as frame ``f``. Raises DataError, as ``read_frame``."""
    expected = int(manifest.frame_bytes[f])
    if len(data) != expected:
        raise _damaged(manifest, f, f"{len(data)} of its {expected} bytes were read")
    if digest_words(xxhash.xxh3_128_hexdigest(data)) != tuple(manifest.frame_digest[f].tolist()):
        raise _damaged(manifest, f, "its bytes do not match their digest")
    try:
        samples = parse_frame(data, int(manifest.frame_raw_bytes[f]))
    except ValueError as error:
        raise _damaged(manifest, f, str(error)) from error
    rows = slice(int(manifest.frame_first[f]), int(manifest.frame_first[f + 1]))
    for found, column in (
        ([s.id for s in samples], "sample_id"),
        ([s.label for s in samples], "label"),
        ([s.size for s in samples], "size"),
    ):
        if not np.array_equal(found, getattr(manifest, column)[rows]):
            raise _damaged(manifest, f, f"its samples disagree with the manifest's {column}")
    return samples


def _damaged(manifest: Manifest, f: int, cause: str) -> DataError:
    return DataError(
        f"{manifest.frame_url(f)}, frame {f} (at byte {manifest.frame_offset[f]}): {cause}; restore the shard from a "
        "copy or write the dataset anew, `fitv2 shard verify` lists all that is damaged"
    )
