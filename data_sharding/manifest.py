"""The manifest: what a dataset holds, as one small JSON header and columns that every rank can map into memory.

    DST/manifest.json              written last: while it is absent there is no dataset
    DST/manifest/<column>.npy      plain .npy, little-endian, no pickle (``COLUMNS`` below)
    DST/shard-000000.tar.zst ...   see ``shard.py``

A header (F frames, N samples; ``source`` says what was written and with which options):

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

import numpy as np
import xxhash

from data_sharding.connect import file_system, is_local
from data_sharding.errors import DataError
from data_sharding.shard import ShardIndex
from data_sharding.storage import put, read

FORMAT = "fitv2-shards"
VERSION = 1  # tick when a reader of the old version would misread the new one
FILE = "manifest.json"

# column: (dtype, rows counted in, shape of a row). F frames, F+1 their boundaries, N samples.
COLUMNS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "frame_shard": ("<i4", "F", ()),  # index into the header's shards
    "frame_offset": ("<i8", "F", ()),  # bytes from the start of the shard's file
    "frame_bytes": ("<i8", "F", ()),  # compressed
    "frame_raw_bytes": ("<i8", "F", ()),  # decompressed
    "frame_digest": ("<u8", "F", (2,)),  # xxh3_128 of the compressed frame: low word, high word
    "frame_first": ("<i8", "F+1", ()),  # the frame's samples are rows frame_first[f] .. frame_first[f+1]-1
    "sample_id": ("<i8", "N", ()),
    "label": ("<i4", "N", ()),
    "size": ("<u2", "N", (2, 2)),  # [resize|crop][h, w] in tokens; zeros where the image has no crop view
}


@dataclass(frozen=True)
class ShardEntry:
    """One shard's file; ``xxh3_128`` is the hex digest of the whole file."""

    name: str
    bytes: int
    samples: int
    frames: int
    xxh3_128: str


@dataclass(frozen=True)
class Header:
    """``manifest.json`` (sample in the module's docstring) without ``format``, ``version`` and ``class_count``."""

    codec: dict[str, str | float]
    dtype: str
    max_tokens: int
    classes: tuple[str, ...]
    shards: tuple[ShardEntry, ...]
    columns: dict[str, dict[str, int | str]]
    totals: dict[str, int]
    source: dict[str, str | int | float]

    def to_json(self) -> bytes:
        record = {"format": FORMAT, "version": VERSION, "class_count": len(self.classes), **asdict(self)}
        return json.dumps(record, ensure_ascii=False, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Header":
        try:
            record = json.loads(data)
            if record["format"] != FORMAT or record["version"] != VERSION:
                raise DataError(
                    f"{where} is of format {record['format']} version {record['version']}, this program reads {FORMAT} "
                    f"version {VERSION}: write the dataset anew or use the program it was written with"
                )
            values = {field.name: record[field.name] for field in fields(cls)}
            values["shards"] = tuple(ShardEntry(**entry) for entry in record["shards"])
            values["classes"] = tuple(record["classes"])
            header = cls(**values)
            counted = {key: sum(getattr(s, key) for s in header.shards) for key in ("samples", "frames", "bytes")}
            agrees = record["class_count"] == len(header.classes) and counted.items() <= header.totals.items()
            known = {file: (int(c["bytes"]), str(c["xxh3_128"])) for file, c in header.columns.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where} is damaged ({error!r}): restore it or write the dataset anew") from error
        if not agrees or set(known) != {f"{name}.npy" for name in COLUMNS}:
            raise DataError(f"{where} contradicts itself (totals, class_count or columns): write the dataset anew")
        return header


@dataclass(frozen=True, eq=False)
class Manifest:
    """A dataset's header and columns (dtypes and shapes in ``COLUMNS``); local columns are mapped, not read.

    ``digest`` is the sha256 of ``manifest.json``. As the header holds every other digest, it stands for all bytes of
    the dataset.
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
    def load(cls, url: str) -> "Manifest":
        """Opens the dataset at ``url`` and checks that columns and header agree.

        Raises:
            DataError: no dataset there, or a file is missing, damaged or contradicts another; names file and remedy.
        """
        url = url.rstrip("/")
        data = _read_header(url)
        header = Header.from_json(data, f"{url}/{FILE}")
        columns = {name: _read_column(url, name, header) for name in COLUMNS}
        manifest = cls(url=url, digest=hashlib.sha256(data).hexdigest(), header=header, **columns)
        manifest.check()
        return manifest

    @property
    def classes(self) -> tuple[str, ...]:
        return self.header.classes

    @property
    def shards(self) -> tuple[ShardEntry, ...]:
        return self.header.shards

    def frame_url(self, f: int) -> str:
        """The URL of the shard that holds frame ``f``."""
        return f"{self.url}/{self.shards[self.frame_shard[f]].name}"

    def check(self) -> None:
        """Raises DataError where columns contradict each other or the header. Reads no shard (``verify`` does)."""
        for problem, column in _contradictions(self):
            raise DataError(
                f"{self.url}/manifest/{column}.npy: {problem}: the manifest is not the one that was written with these "
                "shards, restore it or write the dataset anew"
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
    codec: dict[str, str | float],
    dtype: str,
    max_tokens: int,
    classes: tuple[str, ...],
    skipped: int,
    source: dict[str, str | int | float],
) -> Header:
    """Writes the columns and then, as the act that makes the dataset exist, ``manifest.json``."""
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


def _read_header(url: str) -> bytes:
    try:
        return read(f"{url}/{FILE}")
    except (FileNotFoundError, NotADirectoryError) as error:
        fs, path = file_system(url)
        if fs.exists(f"{path}/parts"):
            remedy = "it is unfinished, run the same `fitv2 shard write` again and it goes on where it was"
        else:
            remedy = "write one with `fitv2 shard write SRC DST` or correct the URL"
        raise DataError(f"there is no dataset at {url} ({FILE} is missing): {remedy}") from error


def _read_column(url: str, name: str, header: Header) -> np.ndarray:
    where, expected = f"{url}/manifest/{name}.npy", header.columns[f"{name}.npy"]
    fs, path = file_system(where)
    remedy = "restore it or write the dataset anew"
    digest = xxhash.xxh3_128()
    try:
        if is_local(fs):
            # Hashed through the file, not the mapping: a mapping would count the whole column as resident memory.
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            column = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            data = read(where)
            digest.update(data)
            column = np.load(io.BytesIO(data), allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{where} is missing: {remedy}") from error
    except (ValueError, EOFError) as error:
        raise DataError(f"{where} is not a whole .npy file: {remedy}") from error
    if digest.hexdigest() != expected["xxh3_128"]:
        raise DataError(f"{where} does not match its digest in {FILE}: {remedy}")
    dtype, rows, row_shape = COLUMNS[name]
    totals = header.totals
    shape = ({"F": totals["frames"], "F+1": totals["frames"] + 1, "N": totals["samples"]}[rows], *row_shape)
    if column.shape != shape or column.dtype != np.dtype(dtype):
        raise DataError(f"{where} is {column.dtype}{list(column.shape)}, not {np.dtype(dtype)}{list(shape)}: {remedy}")
    return column


def _contradictions(m: Manifest):
    """Yields (what is wrong, in which column)."""
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
        yield "a frame ends behind the end of its shard", "frame_bytes"
    if len(m.label) and not 0 <= m.label.min() <= m.label.max() < len(m.classes):
        yield f"labels {m.label.min()} .. {m.label.max()} do not fit {len(m.classes)} classes", "label"
    tokens = m.size[:, :, 0].astype(np.int64) * m.size[:, :, 1]
    if len(tokens) and (tokens[:, 0].min() < 1 or tokens.max() > m.header.max_tokens):
        yield f"views hold {tokens[:, 0].min()} .. {tokens.max()} tokens, not 1 .. {m.header.max_tokens}", "size"
    if len(m.sample_id) and m.sample_id.min() < 0:
        yield "ids are negative", "sample_id"
