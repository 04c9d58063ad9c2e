"""Datasets of any number of images that consist of a manifest only: they can be planned but not read."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from data_sharding.format.codecs import get_codec
from data_sharding.format.columns import COLUMNS
from data_sharding.format.manifest import FILE, Header, ShardEntry, SourceRecord
from data_sharding.plan.size_presets import open_preset

_FRAME_IMAGES, _SHARD_FRAMES = 64, 16
_FRAME_BYTES = 1 << 20
_CLASSES = tuple(f"class {i}" for i in range(1000))
_MAX_TOKENS = 256
_CHUNK = 1 << 20  # rows


def write_columns(url: str, images: int) -> None:
    """Writes a manifest of ``images`` to the local ``url``, with the lengths of ``preset:imagenet256``, repeated, and
    frames of 64 images. There are no shards. Takes 20 bytes per image on disk, and little memory."""
    frames = -(-images // _FRAME_IMAGES)
    lengths = open_preset("preset:imagenet256", min(images, _CHUNK)).size
    rows: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "frame_shard": lambda f: f // _SHARD_FRAMES,
        "frame_offset": lambda f: f % _SHARD_FRAMES * _FRAME_BYTES,
        "frame_bytes": lambda f: np.full_like(f, _FRAME_BYTES),
        "frame_raw_bytes": lambda f: np.full_like(f, _FRAME_BYTES),
        "frame_digest": lambda f: np.stack((f, f), -1),
        "frame_first": lambda f: np.minimum(f * _FRAME_IMAGES, images),
        "sample_id": lambda i: i,
        "label": lambda i: i % len(_CLASSES),
        "size": lambda i: lengths[i % len(lengths)],
    }
    counts = {"F": frames, "F+1": frames + 1, "N": images}
    Path(url, "manifest").mkdir(parents=True)
    columns = {}
    for name, (dtype, counted, row_shape) in COLUMNS.items():
        shape = (counts[counted], *row_shape)
        columns[f"{name}.npy"] = _write_column(Path(url, "manifest", f"{name}.npy"), dtype, shape, rows[name])
    shards = tuple(
        _entry(start, min(start + _SHARD_FRAMES, frames), images) for start in range(0, frames, _SHARD_FRAMES)
    )
    totals = {key: sum(getattr(s, key) for s in shards) for key in ("samples", "frames", "bytes")} | {"skipped": 0}
    source: SourceRecord = {"digest": "", "images_per_shard": _SHARD_FRAMES * _FRAME_IMAGES, "holdout": 0.0}
    header = Header(get_codec("dct").record, "float16", _MAX_TOKENS, _CLASSES, shards, columns, totals, source)
    Path(url, FILE).write_bytes(header.to_json())


def _entry(first: int, end: int, images: int) -> ShardEntry:
    samples = min(end * _FRAME_IMAGES, images) - first * _FRAME_IMAGES
    name = f"shard-{first // _SHARD_FRAMES:06d}.tar.zst"
    return ShardEntry(name, (end - first) * _FRAME_BYTES, samples, end - first, "")


def _write_column(path: Path, dtype: str, shape: tuple[int, ...], rows: Callable) -> dict[str, int | str]:
    """Writes a column and returns its entry in the header."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "wb") as file:
        for data in _npy(dtype, shape, rows):
            digest.update(data)
            size += file.write(data)
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def _npy(dtype: str, shape: tuple[int, ...], rows: Callable) -> Iterator[bytes]:
    """The bytes of a .npy file, in pieces."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    yield header.getvalue()
    for start in range(0, shape[0], _CHUNK):
        yield rows(np.arange(start, min(start + _CHUNK, shape[0]))).astype(dtype).tobytes()
