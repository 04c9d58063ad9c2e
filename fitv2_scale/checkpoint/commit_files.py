"""The files of a commit: safetensors for data, JSON for the rest. Nothing is unpickled.

A folder holds ``rank-00000.safetensors`` …, one key per box, and ``manifest.json``:

    {"format": 2, "step": 300, …,
     "files": {"rank-00000.safetensors": {"bytes": 7120, "xxh3_128": ["9f…"]}},
     "tensors": {"param/x_embedder.proj.weight": {"shape": [192, 16], "boxes": [
         {"offset": [0, 0], "shape": [96, 16], "file": "rank-00000.safetensors", "begin": 512}, …]}}}

Each digest covers ``checksums.CHUNK`` bytes of its file.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_sharding.errors import UserError
from data_sharding.storage.store import Store
from fitv2_scale.checkpoint.checksums import CHUNK, ChunkReader, Damaged, FileSpan
from fitv2_scale.checkpoint.safetensors_file import Written, write_safetensors
from fitv2_scale.checkpoint.save_plan import SavePlan, file_of
from fitv2_scale.parallel.boxes import Box, LogicalTensor

FORMAT = 2
MANIFEST = "manifest.json"
_ITEM = torch.float32.itemsize
_LOOKING = 16  # files of a commit that are looked for at once


def write_manifest(store: Store, folder: str, header: dict, files: dict[str, dict], tensors: bytes) -> str:
    """Writes a commit's manifest (see above), of which ``tensors`` is JSON already; returns its sha256, for the COMMIT
    entry."""
    head = json.dumps({"format": FORMAT, **header, "files": files}).encode()
    text = b'%b, "tensors": %b}' % (head.removesuffix(b"}"), tensors)
    store.put(f"{folder}/{MANIFEST}", text)
    return hashlib.sha256(text).hexdigest()


def file_record(written: Written) -> dict:
    """A file as the manifest holds it."""
    return {"bytes": written.bytes, "xxh3_128": written.xxh3_128}


class CommitWriter:
    """Writes one file per rank that has something to write, and the manifest."""

    def __init__(self, store: Store, folder: str, rank: int, plan: SavePlan):
        self._store, self._folder, self._rank, self._plan = store, folder, rank, plan

    def write_data(self) -> dict | None:
        """Writes this rank's file; returns its record, None if there is nothing to write."""
        if not self._plan.entries:
            return None
        return file_record(write_safetensors(self._store, f"{self._folder}/{file_of(self._rank)}", self._plan.entries))

    def finish(self, header: dict, records: Sequence[dict | None]) -> str:
        """On rank 0, with the record of each rank's file: writes the manifest, returns its sha256."""
        files = {file_of(rank): record for rank, record in enumerate(records) if record is not None}
        self._require(files)
        return write_manifest(self._store, self._folder, header, files, self._plan.listed)

    def _require(self, files: dict[str, dict]) -> None:
        """Raises UserError unless this rank, which writes the manifest, sees all files as they were written: another
        rank may have written into a folder of its own."""

        def check(file: str) -> None:
            path, size = f"{self._folder}/{file}", files[file]["bytes"]
            try:
                found = self._store.size(path)
            except FileNotFoundError:
                found = None
            if found != size:
                here = "is not there" if found is None else f"has {found} bytes there, not the {size} that were written"
                raise UserError(f"{self._store.path(path)} {here}: do all nodes share this place?")

        with ThreadPoolExecutor(_LOOKING, thread_name_prefix="sizes") as pool:
            list(pool.map(check, sorted(files)))


def box_record(offset: Sequence[int], shape: Sequence[int], file: str, begin: int) -> dict:
    """A box as the manifest holds it."""
    return {"offset": list(offset), "shape": list(shape), "file": file, "begin": begin}


class CommitReader:
    """Reads the parts of a commit that a rank needs, and no more than the chunks around them, directly into place: this
    takes memory for a few chunks, however large the tensors are. Raises Damaged.

    ``reading(act)`` calls ``act()``, which reads data, once or more.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        manifest: dict,
        reading: Callable[[Callable[[], None]], None] = lambda act: act(),
    ):
        self._reading = reading
        self._chunks = ChunkReader(store, folder, manifest["files"])
        self._tensors = manifest["tensors"]

    def read(self, tensors: Mapping[str, LogicalTensor]) -> None:
        """Fills the boxes of ``tensors`` from the stored ones of the same names. Raises ValueError if the shapes of the
        whole tensors differ."""
        self._fill(self.parts(tensors))

    def parts(self, tensors: Mapping[str, LogicalTensor]) -> list["_Part"]:
        """What ``read`` reads."""
        parts: list[_Part] = []
        for name, logical in tensors.items():
            if (shape := self._tensors[name]["shape"]) != list(logical.shape):
                raise ValueError(f"{name} has shape {shape} in the commit, {list(logical.shape)} in the network")
            if logical.boxes:
                parts += _overlaps(name, self._tensors[name]["boxes"], logical.boxes)
        return parts

    def read_tensor(self, name: str) -> Tensor:
        """One logical tensor, whole."""
        for file in {box["file"] for box in self._tensors[name]["boxes"]}:
            self._chunks.check_size(file)  # before memory is taken for what may not be there
        full, parts = torch.empty(self._tensors[name]["shape"]), []
        for box in self._tensors[name]["boxes"]:
            target = full
            for dim, (start, length) in enumerate(zip(box["offset"], box["shape"], strict=True)):
                target = target.narrow(dim, start, length)
            parts += _parts(box, [0] * target.dim(), box["shape"], target)
        self._fill(parts)
        return full

    def _fill(self, parts: list["_Part"]) -> None:
        parts.sort(key=lambda part: (part.span.file, part.span.begin))
        buffers: dict[int, Tensor] = {}

        def memory(index: int) -> memoryview:
            part = parts[index]
            if not part.is_direct:
                buffers[index] = torch.empty(part.rows)
            return buffers.get(index, part.target).flatten().view(torch.uint8).numpy().data

        def act() -> None:
            for index in self._chunks.fill([part.span for part in parts], memory):
                if (rows := buffers.pop(index, None)) is not None:
                    parts[index].take(rows)

        self._reading(act)


@dataclass(frozen=True)
class _Part:
    """Some rows (along the first dim) of a stored box, of which ``target`` takes the columns from ``columns`` on."""

    span: FileSpan  # the bytes of the whole rows
    rows: torch.Size  # their shape
    columns: tuple[int, ...]  # offset of the target in all dims but the first
    target: Tensor  # a view

    @property
    def is_direct(self) -> bool:
        """Whether the bytes can be read directly into ``target``."""
        return self.target.shape == self.rows and self.target.is_contiguous() and self.target.device.type == "cpu"

    def take(self, rows: Tensor) -> None:
        for dim, start in enumerate(self.columns, 1):
            rows = rows.narrow(dim, start, self.target.shape[dim])
        self.target.copy_(rows)


def _overlaps(name: str, stored: list[dict], wanted: Sequence[Box]) -> Iterator[_Part]:
    """What of the ``stored`` boxes of a tensor goes into the ``wanted`` ones."""
    shape = len(stored), len(wanted[0].offset)
    begin = np.array([box["offset"] for box in stored], np.int64).reshape(shape)
    end = begin + np.array([box["shape"] for box in stored], np.int64).reshape(shape)
    for box in wanted:
        offset = np.array(box.offset, np.int64)
        low, high = np.maximum(begin, offset), np.minimum(end, offset + np.array(box.tensor.shape, np.int64))
        found = np.flatnonzero((low < high).all(1))
        if (high - low)[found].prod(1).sum() != box.tensor.numel():
            raise Damaged(f"the manifest's boxes of {name} are not all of it")
        for n in found.tolist():
            target, lengths = box.tensor.detach(), (high[n] - low[n]).tolist()
            for dim, (first, length) in enumerate(zip((low[n] - offset).tolist(), lengths, strict=True)):
                target = target.narrow(dim, first, length)
            yield from _parts(stored[n], (low[n] - begin[n]).tolist(), lengths, target)


def _parts(box: dict, offsets: Sequence[int], lengths: Sequence[int], target: Tensor) -> Iterator[_Part]:
    """Part of a stored box, as blocks of rows of about a chunk's size. A scalar is one row."""
    if not box["shape"]:
        yield _Part(FileSpan(box["file"], box["begin"], box["begin"] + _ITEM), torch.Size(), (), target)
        return
    size = math.prod(box["shape"][1:]) * _ITEM  # of a row
    several = max(1, CHUNK // max(1, size))
    for low in range(0, lengths[0], several):
        count = min(several, lengths[0] - low)
        begin = box["begin"] + (offsets[0] + low) * size
        span = FileSpan(box["file"], begin, begin + count * size)
        shape = torch.Size([count, *box["shape"][1:]])
        yield _Part(span, shape, tuple(offsets[1:]), target.narrow(0, low, count))
