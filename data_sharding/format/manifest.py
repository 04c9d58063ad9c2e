"""The manifest of a dataset: one small JSON header, and columns that every rank can map into memory.

    DST/manifest.json              written last: without it there is no dataset
    DST/manifest/<column>.npy      see ``columns.py``
    DST/shard-000000.tar.zst ...   see ``shard.py``

A header (``source`` holds the source's digest and the options of the writer; ``codec`` as in ``CodecRecord``):

    {"format": "fitv2-shards", "version": 1, "codec": {"name": "dct", "digest": "5f0c…", "scale": 1.0},
     "dtype": "float16", "max_tokens": 256, "class_count": 2, "classes": ["cat", "dog"],
     "shards": [{"name": "shard-000000.tar.zst", "bytes": 7340032, "samples": 1000, "frames": 9, "xxh3_128": "…"}],
     "columns": {"frame_shard.npy": {"bytes": 164, "xxh3_128": "…"}, …},
     "totals": {"samples": 1000, "frames": 9, "bytes": 7340032, "skipped": 0},
     "source": {"digest": "…", "images_per_shard": 1000, "holdout": 0.0}}
"""

import hashlib
import io
import json
from dataclasses import asdict, dataclass, fields
from typing import TypedDict

import numpy as np
import xxhash

from data_sharding.errors import DataError
from data_sharding.format.codec import CodecRecord, channels_of
from data_sharding.format.columns import COLUMNS, blocks, read_column
from data_sharding.format.shard import ShardIndex
from data_sharding.storage.files import exists, put, read
from data_sharding.storage.json_bytes import parse_json

FORMAT = "fitv2-shards"
VERSION = 1  # increase when a reader of the old version would misread the new one
FILE = "manifest.json"


@dataclass(frozen=True)
class ShardEntry:
    """One shard's file; ``xxh3_128`` is the hex digest of the whole file."""

    name: str
    bytes: int
    samples: int
    frames: int
    xxh3_128: str


class SourceRecord(TypedDict):
    """The source's digest, and the writer's options that decide the bytes."""

    digest: str
    images_per_shard: int
    holdout: float


@dataclass(frozen=True)
class Header:
    """``manifest.json`` (sample in the module's docstring) without ``format``, ``version`` and ``class_count``."""

    codec: CodecRecord
    dtype: str
    max_tokens: int
    classes: tuple[str, ...]
    shards: tuple[ShardEntry, ...]
    columns: dict[str, dict[str, int | str]]
    totals: dict[str, int]
    source: SourceRecord

    @property
    def latent_channels(self) -> int:
        """Of the codec; a stored token holds 2 x 2 times as many numbers."""
        return channels_of(self.codec)

    def to_json(self) -> bytes:
        """The bytes of ``manifest.json``."""
        record = {"format": FORMAT, "version": VERSION, "class_count": len(self.classes), **asdict(self)}
        return json.dumps(record, ensure_ascii=False, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Header":
        """Parses ``data``, read from ``where``. Raises DataError if it is damaged or of another version."""
        try:
            record = parse_json(data)
            if record["format"] != FORMAT or record["version"] != VERSION:
                raise DataError(
                    f"{where} is of format {record['format']} version {record['version']}, this program reads {FORMAT} "
                    f"version {VERSION}: write the dataset again, or use the program version that wrote it"
                )
            values = {field.name: record[field.name] for field in fields(cls)}
            values["shards"] = tuple(ShardEntry(**entry) for entry in record["shards"])
            values["classes"] = tuple(record["classes"])
            header = cls(**values)
            counted = {key: sum(getattr(s, key) for s in header.shards) for key in ("samples", "frames", "bytes")}
            channels_of(header.codec)
            agrees = record["class_count"] == len(header.classes) and counted.items() <= header.totals.items()
            known = {file: (int(c["bytes"]), str(c["xxh3_128"])) for file, c in header.columns.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{where} is damaged ({error!r}): restore it from a copy or write the dataset again"
            ) from error
        if not agrees or set(known) != {f"{name}.npy" for name in COLUMNS}:
            raise DataError(f"{where} contradicts itself (totals, class_count or columns): write the dataset again")
        return header


@dataclass(frozen=True, eq=False)
class Manifest:
    """A dataset's header and columns (dtypes and shapes in ``COLUMNS``).

    ``digest`` is the sha256 of ``manifest.json``. As the header holds every other digest, it covers all bytes of the
    dataset.
    """

    url: str
    digest: str
    header: Header
    frame_shard: np.ndarray
    frame_offset: np.ndarray
    frame_bytes: np.ndarray
    frame_raw_bytes: np.ndarray
    frame_digest: np.ndarray
    frame_first: np.ndarray
    sample_id: np.ndarray
    label: np.ndarray
    size: np.ndarray

    @classmethod
    def load(cls, url: str, cache_dir: str = "") -> "Manifest":
        """Opens the dataset at ``url`` and checks that columns and header agree.

        Columns are mapped into memory. Those on an object store are copied to ``cache_dir`` first; without one, they
        are read into the memory of this process, 20 bytes an image.

        Raises:
            DataError: no dataset there, or a file is missing, damaged or contradicts another. Names file and remedy.
        """
        url = url.rstrip("/")
        header, digest = read_header(url)
        columns = {
            name: read_column(url, name, header.columns[f"{name}.npy"], header.totals, cache_dir) for name in COLUMNS
        }
        manifest = cls(url=url, digest=digest, header=header, **columns)
        manifest.check()
        return manifest

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; a label is an index into them."""
        return self.header.classes

    @property
    def shards(self) -> tuple[ShardEntry, ...]:
        """One entry per shard; ``frame_shard`` holds indices into them."""
        return self.header.shards

    def frame_url(self, f: int) -> str:
        """The URL of the shard that holds frame ``f``."""
        return f"{self.url}/{self.shards[self.frame_shard[f]].name}"

    def check(self) -> None:
        """Raises DataError where columns contradict each other or the header. Reads no shard (``verify`` does)."""
        for problem, column in _contradictions(self):
            raise DataError(
                f"{self.url}/manifest/{column}.npy: {problem}: the manifest was not written with these shards; restore "
                "it from a copy or write the dataset again"
            )


def columns_of(indexes: list[ShardIndex]) -> dict[str, np.ndarray]:
    """The manifest's columns for shards in this order."""
    frames = [frame for index in indexes for frame in index.frames]
    samples = [sample for index in indexes for sample in index.samples]
    values = {
        "frame_shard": np.repeat(np.arange(len(indexes)), [len(index.frames) for index in indexes]),
        "frame_offset": [frame.offset for frame in frames],
        "frame_bytes": [frame.bytes for frame in frames],
        "frame_raw_bytes": [frame.raw_bytes for frame in frames],
        "frame_digest": np.array([digest_words(frame.xxh3_128) for frame in frames], np.uint64).reshape(-1, 2),
        "frame_first": np.cumsum([0, *(frame.samples for frame in frames)]),
        "sample_id": [sample.id for sample in samples],
        "label": [sample.label for sample in samples],
        "size": np.array([sample.size for sample in samples]).reshape(-1, 2, 2),
    }
    return {name: np.asarray(values[name], dtype) for name, (dtype, _, _) in COLUMNS.items()}


def digest_words(xxh3_128: str) -> tuple[int, int]:
    """The hex digest as the (low, high) 64-bit words of ``frame_digest``."""
    value = int(xxh3_128, 16)
    return value & 0xFFFFFFFFFFFFFFFF, value >> 64


def write_manifest(
    url: str,
    indexes: list[ShardIndex],
    *,
    codec: CodecRecord,
    dtype: str,
    max_tokens: int,
    classes: tuple[str, ...],
    skipped: int,
    source: SourceRecord,
) -> Header:
    """Writes the columns and then ``manifest.json``, which makes the dataset exist. Returns the header."""
    written = {}
    for name, column in columns_of(indexes).items():
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, column, version=(1, 0), allow_pickle=False)
        data = buffer.getvalue()
        written[f"{name}.npy"] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
        put(f"{url}/manifest/{name}.npy", data)
    shards = tuple(ShardEntry(i.name, i.bytes, len(i.samples), len(i.frames), i.xxh3_128) for i in indexes)
    totals = {key: sum(getattr(s, key) for s in shards) for key in ("samples", "frames", "bytes")}
    header = Header(codec, dtype, max_tokens, classes, shards, written, {**totals, "skipped": skipped}, source)
    put(f"{url}/{FILE}", header.to_json())
    return header


def read_header(url: str) -> tuple[Header, str]:
    """The header of the dataset at ``url``, without its columns, and the dataset's digest. Raises DataError."""
    try:
        data = read(f"{url}/{FILE}")
    except FileNotFoundError as error:
        if exists(f"{url}/parts"):
            remedy = (
                "it is unfinished; run the same `fitv2 shard write` or `import` again, it continues where it stopped "
                f"(if the source has changed since, remove it first: rm -r {url})"
            )
        else:
            remedy = "write one with `fitv2 shard write` or `fitv2 shard import`, or correct the URL"
        raise DataError(f"there is no dataset at {url} ({FILE} is missing): {remedy}") from error
    return Header.from_json(data, f"{url}/{FILE}"), hashlib.sha256(data).hexdigest()


def _contradictions(m: Manifest):
    """Yields (problem, name of the column)."""
    frames_of = np.array([s.frames for s in m.shards], np.int64)
    if not np.array_equal(m.frame_shard, np.repeat(np.arange(len(m.shards)), frames_of)):
        yield "frames are not listed shard by shard as the header counts them", "frame_shard"
        return
    if m.frame_first[0] != 0 or m.frame_first[-1] != len(m.sample_id) or (np.diff(m.frame_first) < 1).any():
        yield "frames do not cover the samples one after the other", "frame_first"
    ends = m.frame_offset + m.frame_bytes
    starts_shard = np.diff(m.frame_shard, prepend=-1) != 0
    if (m.frame_offset[starts_shard] != 0).any() or (m.frame_offset[1:] != ends[:-1])[~starts_shard[1:]].any():
        yield "frames do not follow one another in their shard", "frame_offset"
    if (ends > np.repeat([s.bytes for s in m.shards], frames_of)).any():
        yield "a frame ends after the end of its shard", "frame_bytes"
    if not len(m.sample_id):
        return
    found = []
    for ids, labels, size in zip(blocks(m.sample_id), blocks(m.label), blocks(m.size), strict=True):
        tokens = np.multiply(size[:, :, 0], size[:, :, 1], dtype=np.uint32)  # (n, view)
        found.append((ids.min(), labels.min(), labels.max(), tokens[:, 0].min(), tokens.max()))
    first_id, first_label, _, shortest, _ = np.min(found, 0).tolist()
    _, _, last_label, _, longest = np.max(found, 0).tolist()
    if not 0 <= first_label <= last_label < len(m.classes):
        yield f"labels {first_label} .. {last_label} do not fit {len(m.classes)} classes", "label"
    if shortest < 1 or longest > m.header.max_tokens:
        yield f"views hold {shortest} .. {longest} tokens, not 1 .. {m.header.max_tokens}", "size"
    if first_id < 0:
        yield "ids are negative", "sample_id"
