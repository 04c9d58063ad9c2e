"""The files of a commit, written and read by torch.distributed.checkpoint (DCP): safetensors for data, JSON for the
rest.

DCP's own format keeps its metadata as a pickle, and unpickling executes what the file contains. Here nothing is
unpickled. A folder holds ``rank-00000.safetensors`` …, one key per box, and ``manifest.json``:

    {"format": 2, "step": 300, …,
     "files": {"rank-00000.safetensors": {"bytes": 7120, "xxh3_128": ["9f…"]}},
     "tensors": {"param/x_embedder.proj.weight": {"shape": [192, 16], "boxes": [
         {"offset": [0, 0], "shape": [96, 16], "file": "rank-00000.safetensors", "begin": 512}, …]}}}

Each digest covers ``checksums.CHUNK`` bytes of its file.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from data_sharding.errors import UserError
from data_sharding.storage.store import Store
from fitv2_scale.checkpoint.checksums import CHUNK, ChunkReader, FileSpan
from fitv2_scale.checkpoint.safetensors_file import TensorToWrite, Written, write_safetensors

FORMAT = 2
MANIFEST = "manifest.json"
_ITEM = torch.float32.itemsize
_LOOKING = 16  # files of a commit that are looked for at once


def write_manifest(store: Store, folder: str, header: dict, files: dict[str, Written], tensors: dict) -> str:
    """Writes a commit's manifest (see above); returns its sha256, for the COMMIT entry."""
    recorded = {name: {"bytes": w.bytes, "xxh3_128": w.xxh3_128} for name, w in files.items()}
    text = json.dumps({"format": FORMAT, **header, "files": recorded, "tensors": tensors}).encode()
    store.put(f"{folder}/{MANIFEST}", text)
    return hashlib.sha256(text).hexdigest()


@dataclass(frozen=True)
class _Place:
    """Where a box was written: sent by each rank to the one that writes the manifest."""

    file: str
    begin: int
    written: Written


class CommitWriter(StorageWriter):
    """Writes one file per rank that has something to write. After dcp.save, ``manifest_digest`` is on rank 0 the
    sha256 of the manifest, for the COMMIT entry; on other ranks it stays empty."""

    def __init__(self, store: Store, folder: str, rank: int, header: dict):
        self._store, self._folder = store, folder
        self._rank, self._header = rank, header
        self.manifest_digest = ""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        file, entries = f"rank-{self._rank:05d}.safetensors", self._entries(plan, planner)
        results = []
        if entries:
            written = write_safetensors(self._store, f"{self._folder}/{file}", entries)
            results = [
                WriteResult(item.index, entry.nbytes, _Place(file, written.begins[entry.key], written))
                for item, entry in zip(plan.items, entries, strict=True)
            ]
        return _done(results)

    @staticmethod
    def _entries(plan: SavePlan, planner: SavePlanner) -> list[TensorToWrite]:
        """What this rank writes; ``read`` gives live memory."""
        entries = []
        for item in plan.items:
            stored = item.tensor_data
            assert stored is not None, f"{item.index.fqn} is no tensor"
            dtype, shape = stored.properties.dtype, tuple(stored.chunk.sizes)
            entries.append(TensorToWrite(_key(item.index), dtype, shape, partial(_resolved, planner, item)))
        return entries

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places: dict[MetadataIndex, _Place] = {r.index: r.storage_data for rank in results for r in rank}
        files, tensors = {p.file: p.written for p in places.values()}, {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata), f"{name} is no tensor"
            boxes = []
            for chunk in stored.chunks:
                place = places[MetadataIndex(name, chunk.offsets)]
                boxes.append(box_record(chunk.offsets, chunk.sizes, place.file, place.begin))
            tensors[name] = {"shape": list(stored.size), "boxes": boxes}
        self._require(files)
        self.manifest_digest = write_manifest(self._store, self._folder, self._header, files, tensors)

    def _require(self, files: dict[str, Written]) -> None:
        """Raises UserError unless this rank, which writes the manifest, sees all files as they were written: another
        rank may have written into a folder of its own."""

        def check(file: str) -> None:
            path, size = f"{self._folder}/{file}", files[file].bytes
            try:
                found = self._store.size(path)
            except FileNotFoundError:
                found = None
            if found != size:
                here = "is not there" if found is None else f"has {found} bytes there, not the {size} that were written"
                raise UserError(f"{self._store.path(path)} {here}: do all nodes share this place?")

        with ThreadPoolExecutor(_LOOKING, thread_name_prefix="sizes") as pool:
            list(pool.map(check, sorted(files)))

    def reset(self, checkpoint_id=None) -> None: ...
    def set_up_storage_writer(self, is_coordinator: bool, *args, **kwargs) -> None: ...
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


def _resolved(planner: SavePlanner, item: WriteItem) -> Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor)
    return tensor


def box_record(offset: Sequence[int], shape: Sequence[int], file: str, begin: int) -> dict:
    """A box as the manifest holds it."""
    return {"offset": list(offset), "shape": list(shape), "file": file, "begin": begin}


class CommitReader(StorageReader):
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
        self._boxes = {
            MetadataIndex(name, torch.Size(box["offset"])): box
            for name, tensor in self._tensors.items()
            for box in tensor["boxes"]
        }

    def read_metadata(self, *args, **kwargs) -> Metadata:
        properties = TensorProperties(dtype=torch.float32)
        state: dict[str, STORAGE_TYPES] = {}
        for name, tensor in self._tensors.items():
            boxes = tensor["boxes"]
            chunks = [ChunkStorageMetadata(torch.Size(box["offset"]), torch.Size(box["shape"])) for box in boxes]
            state[name] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), chunks)
        return Metadata(state_dict_metadata=state)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args, **kwargs) -> None: ...
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        parts: list[_Part] = []
        for item in plan.items:
            box, target = self._boxes[item.storage_index], planner.resolve_tensor(item).detach()
            parts += _parts(box, item.storage_offsets, item.lengths, target)
        self._fill(parts)
        return _done(None)

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

    def reset(self, checkpoint_id=None) -> None: ...
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


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


def _key(index: MetadataIndex) -> str:
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


def _done(value):
    future: Future = Future()
    future.set_result(value)
    return future
