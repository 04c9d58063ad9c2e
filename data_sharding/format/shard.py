"""The shard: a standard tar of samples inside zstd, in frames that can be fetched and read one by one.

A sample is two or three members, named as WebDataset does, with its id in 16 hex digits as the key:

    00c3a1f26b90d4e7.resize.npy    float16 (2, h, w, 16): [flip, row, column, (c p1 p2)]; flip 0 as it is, 1 mirrored;
                                   16 = 4 * 4 for a codec of 4 channels, 4 * channels for another
    00c3a1f26b90d4e7.crop.npy      the same for the crop view; absent if the image has none
    00c3a1f26b90d4e7.json          {"id": 55065209174414567, "label": 3, "class": "cat", "source": "cat/0007.jpg",
                                    "pixels": [375, 500]}            (height and width of the source image, or null)

The bytes are deterministic: ustar headers with no time, owner or host. Samples are gathered until they fill
``FRAME_RAW_BYTES`` and compressed as an independent zstd frame; the tar's end-of-archive blocks are a last frame. The
concatenation is one valid zstd stream of one valid tar, so `zstd -d < shard | tar x` reads it, and any one frame is a
sequence of whole samples. Frames are read by offset with known sizes and digests, because a zstd stream reader may
take the end of a frame, or of a truncated file, for the end of the data.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import xxhash
import zstandard

from data_sharding.format.codec import LATENT_CHANNELS
from data_sharding.format.stored_array import DTYPE, ArrayShape, stored_array
from data_sharding.storage.store import Bytes

VIEWS = ("resize", "crop")
FRAME_RAW_BYTES = 1 << 20  # 128 KiB would compress as well; 1 MiB keeps the requests to an object store few
# Of fp16 latents only the exponents can be compressed. That would save 8 % of the bytes (any level above 0), and every
# rank would take five times as long to decompress a frame.
LEVEL = -1
_KEY = 16  # hex digits of an id
END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True, eq=False)
class Sample:
    """One image: ``views`` maps "resize", and "crop" where there is one, to float16 (2, h, w, C)."""

    id: int
    label: int
    views: dict[str, np.ndarray]

    @property
    def size(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(h, w) in tokens of the resize and the crop view; (0, 0) for a view that is absent."""
        resize, crop = (self.views[v].shape[1:3] if v in self.views else (0, 0) for v in VIEWS)
        return resize, crop


class FrameRow(NamedTuple):
    """A frame: ``offset`` from the start of its shard, sizes in bytes, digest of the compressed bytes."""

    offset: int
    bytes: int
    raw_bytes: int
    xxh3_128: str
    samples: int


class SampleRow(NamedTuple):
    """``size`` as in ``Sample``."""

    id: int
    label: int
    size: tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class ShardIndex:
    """The manifest's data on one shard."""

    name: str
    bytes: int
    xxh3_128: str
    frames: list[FrameRow]
    samples: list[SampleRow]

    def to_record(self) -> dict:
        """A JSON value: an object; rows become lists in field order."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict) -> "ShardIndex":
        """The inverse of ``to_record``."""
        frames, samples = [FrameRow(*row) for row in record["frames"]], [SampleRow(*row) for row in record["samples"]]
        return cls(record["name"], record["bytes"], record["xxh3_128"], frames, samples)


class ShardBuilder:
    """Gathers samples into the bytes of one shard."""

    def __init__(self, name: str):
        self._name = name
        self._data = bytearray()
        self._pending: list[bytes] = []  # the members of each sample of the frame being gathered
        self._frames: list[FrameRow] = []
        self._samples: list[SampleRow] = []

    def add(self, sample: Sample, *, class_name: str, source: str, pixels: tuple[int, int] | None) -> None:
        """``source`` is the image's key in its source, ``pixels`` its (height, width), or None if unknown."""
        self._pending.append(pack_sample(sample, class_name=class_name, source=source, pixels=pixels))
        self._samples.append(SampleRow(sample.id, sample.label, sample.size))
        if sum(map(len, self._pending)) >= FRAME_RAW_BYTES:
            self._cut()

    def finish(self) -> tuple[bytes, ShardIndex]:
        """The file's bytes and its index. A shard without a sample is an empty archive without frames."""
        if self._pending:
            self._cut()
        data = bytes(self._data) + _compress(END_OF_ARCHIVE)
        return data, ShardIndex(self._name, len(data), xxhash.xxh3_128_hexdigest(data), self._frames, self._samples)

    def _cut(self) -> None:
        raw = b"".join(self._pending)
        frame = _compress(raw)
        digest = xxhash.xxh3_128_hexdigest(frame)
        self._frames.append(FrameRow(len(self._data), len(frame), len(raw), digest, len(self._pending)))
        self._data += frame
        self._pending = []


def pack_sample(sample: Sample, *, class_name: str, source: str, pixels: tuple[int, int] | None) -> bytes:
    """The tar members of one sample, padded to whole blocks."""
    record = {"id": sample.id, "label": sample.label, "class": class_name, "source": source, "pixels": pixels}
    key = f"{sample.id:016x}"
    members = []
    for view in VIEWS:
        if view in sample.views:
            array = sample.views[view]
            assert array.dtype == DTYPE and array.ndim == 4 and array.shape[0] == 2
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            members.append(_member(f"{key}.{view}.npy", buffer.getvalue()))
    members.append(_member(f"{key}.json", json.dumps(record, ensure_ascii=False).encode()))
    return b"".join(members)


def parse_frame(frame: Bytes, raw_bytes: int, latent_channels: int = LATENT_CHANNELS) -> list[Sample]:
    """The samples of one compressed frame, of a dataset whose latents have so many channels.

    Raises:
        ValueError: the bytes are not exactly one frame of ``raw_bytes`` of whole, well-formed samples.
    """
    return [
        # copied: a view into the frame would keep all of it in memory
        Sample(id, label, {v: np.frombuffer(data, DTYPE).reshape(shape).copy() for v, (shape, data) in views.items()})
        for id, label, views in _samples(decompress(frame, raw_bytes), latent_channels)
    ]


def scan_frame(frame: Bytes, raw_bytes: int, latent_channels: int = LATENT_CHANNELS) -> list[SampleRow]:
    """The manifest's rows for the samples of one frame. Checks and raises as ``parse_frame``, but copies no array."""
    rows = []
    for id, label, views in _samples(decompress(frame, raw_bytes), latent_channels):
        resize, crop = (views[v][0][1:3] if v in views else (0, 0) for v in VIEWS)
        rows.append(SampleRow(id, label, (resize, crop)))
    return rows


class RawFrame:
    """One frame, decompressed and indexed, its arrays not parsed: a rank trains on few of the arrays it reads.

    Raises:
        ValueError: the bytes are not exactly one frame of ``raw_bytes`` of whole samples.
    """

    def __init__(self, frame: bytes, raw_bytes: int, latent_channels: int = LATENT_CHANNELS):
        self._raw = raw = decompress(frame, raw_bytes)
        self._latent_channels = latent_channels
        # For each view, the byte at which its data start in each sample, 0 if absent. Two lists, because Python's
        # garbage collector would visit many small objects again and again.
        self._begin: dict[str, list[int]] = {view: [0] for view in VIEWS}
        keys, at = [], 0
        while at < len(raw):
            kind = raw[at + _KEY + 1 : at + _KEY + 7]
            begin = at + tarfile.BLOCKSIZE
            if kind == b"resize":
                self._begin["resize"][-1] = begin
            elif kind == b"crop.n":
                self._begin["crop"][-1] = begin
            else:
                keys.append(raw[at : at + _KEY])
                for begins in self._begin.values():
                    begins.append(0)
            end = begin + _size(raw, at)
            at = end + -end % tarfile.BLOCKSIZE
        if at != len(raw) or any(begins.pop() for begins in self._begin.values()):
            raise ValueError("the last sample is truncated or has no .json")
        self.ids = np.frombuffer(bytes.fromhex(b"".join(keys).decode("ascii")), ">i8").astype(np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of the decompressed frame."""
        return len(self._raw)

    def view(self, sample: int, view: str) -> np.ndarray:
        """float16 (2, h, w, C), read-only: a view of the frame's bytes, which stay in memory as long as it does.

        Raises ValueError if it is malformed, KeyError if the sample has no such view.
        """
        begin = self._begin[view][sample]
        if not begin:
            raise KeyError(view)
        end = begin + _size(self._raw, begin - tarfile.BLOCKSIZE)
        shape, data = stored_array(view, memoryview(self._raw)[begin:end], self._latent_channels)
        return np.frombuffer(data, DTYPE).reshape(shape)


def _samples(raw: bytes, latent_channels: int) -> Iterator[tuple[int, int, dict[str, tuple[ArrayShape, memoryview]]]]:
    """Id, label, and shape and data of each view, of each sample in a sequence of tar members."""
    views: dict[str, tuple[ArrayShape, memoryview]] = {}
    for name, data in _members(raw):
        _, _, kind = name.partition(".")
        if kind == "json":
            record = json.loads(bytes(data))
            id, label = (record.get("id"), record.get("label")) if isinstance(record, dict) else (None, None)
            if not _fits(id, np.int64) or name != f"{id:016x}.json" or "resize" not in views:
                raise ValueError(f"{name} does not complete a sample")
            if not _fits(label, np.int32):
                raise ValueError(f"{name} has the label {label!r}, not a whole number")
            yield id, label, views
            views = {}
        elif kind in ("resize.npy", "crop.npy"):
            views[kind.removesuffix(".npy")] = stored_array(name, data, latent_channels)
        else:
            raise ValueError(f"{name} is no member of a sample")
    if views:
        raise ValueError("the last sample has no .json")


def _fits(number: Any, kind: type[np.signedinteger]) -> TypeGuard[int]:
    """Whether that is a whole number, none below zero, of a manifest's column of this kind."""
    return type(number) is int and 0 <= number <= np.iinfo(kind).max  # True is an int, too


def decompress(frame: Bytes, raw_bytes: int) -> bytes:
    """Decompresses exactly one whole frame of known size. Raises ValueError for anything else."""
    cause = "their header gives another size"
    try:
        if zstandard.frame_content_size(frame) == raw_bytes:
            # In one call: zstandard's streaming readers take half as long again, and accept a truncated frame.
            return zstandard.ZstdDecompressor().decompress(frame, max_output_size=raw_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        cause = str(error)
    raise ValueError(f"{len(frame)} bytes are not one whole frame of {raw_bytes} raw bytes ({cause})")


def _compress(raw: bytes) -> bytes:
    # The checksum is for people who read with `zstd -d`; our own readers check the manifest's digest first.
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True).compress(raw)


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)  # mode 0644, mtime 0, no owner
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _members(raw: bytes) -> Iterator[tuple[str, memoryview]]:
    """Name and data of each member in a sequence of ustar files. Not `tarfile`, which would take most of the time."""
    at, view = 0, memoryview(raw)
    while at < len(raw):
        head = raw[at : at + tarfile.BLOCKSIZE]
        if head[257:262] != b"ustar" or head[156:157] != tarfile.REGTYPE:
            raise ValueError(f"no ustar header of a file at raw byte {at}")
        name, size = head[:100].rstrip(b"\0").decode("ascii"), _size(raw, at)
        at += tarfile.BLOCKSIZE
        if at + size > len(raw):
            raise ValueError(f"{name} is truncated")
        yield name, view[at : at + size]
        at += size + -size % tarfile.BLOCKSIZE


def _size(raw: bytes, at: int) -> int:
    """Bytes of the member whose header begins at ``at``."""
    return int(raw[at + 124 : at + 135], 8)
