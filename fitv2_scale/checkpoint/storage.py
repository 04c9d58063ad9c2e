"""How torch.distributed.checkpoint's plans become files: safetensors for data, JSON for everything else.

DCP's own file format keeps its metadata as a pickle, and unpickling runs whatever the file says. Here nothing is
unpickled. A folder holds ``rank-00000.safetensors`` …, one key a box, and ``manifest.json``:

    {"format": 1, "step": 300, …,
     "files": {"rank-00000.safetensors": {"bytes": 7120, "xxh3_128": "9f…"}},
     "tensors": {"param/x_embedder.proj.weight": {"shape": [192, 16], "boxes": [
         {"offset": [0, 0], "shape": [96, 16], "file": "rank-00000.safetensors", "begin": 512}, …]}}}
"""

import hashlib
import json
from dataclasses import dataclass

import fsspec
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from fitv2_scale.checkpoint.safetensors_file import Entry, Written, write_safetensors
from fitv2_scale.store import Store

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class _Place:
    """Where a box was written: travels from each rank to the one that writes the manifest."""

    file: str
    begin: int
    written: Written


class BoxWriter(StorageWriter):
    """Writes one file per rank that has something to write. ``manifest_digest`` is there on the first rank after
    dcp.save: the sha256 of the manifest, for the COMMIT entry."""

    def __init__(self, store: Store, folder: str, rank: int, header: dict):
        self._store, self._relative = store, folder
        self._fs, self._folder = fsspec.core.url_to_fs(store.path(folder))
        self._rank, self._header = rank, header
        self.manifest_digest: str | None = None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        file = f"rank-{self._rank:05d}.safetensors"
        items = {_key(item.index): item for item in plan.items}
        entries = [
            Entry(
                key,
                item.tensor_data.properties.dtype,
                tuple(item.tensor_data.chunk.sizes),
                lambda item=item: planner.resolve_data(item),
            )
            for key, item in items.items()
        ]
        results = []
        if entries:
            written = write_safetensors(self._fs, f"{self._folder}/{file}", entries)
            results = [
                WriteResult(item.index, entry.nbytes, _Place(file, written.begins[key], written))
                for (key, item), entry in zip(items.items(), entries, strict=True)
            ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places: dict[MetadataIndex, _Place] = {r.index: r.storage_data for rank in results for r in rank}
        files = {p.file: {"bytes": p.written.bytes, "xxh3_128": p.written.xxh3_128} for p in places.values()}
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            boxes = []
            for chunk in stored.chunks:
                place = places[MetadataIndex(name, chunk.offsets)]
                box = {"offset": list(chunk.offsets), "shape": list(chunk.sizes)}
                boxes.append(box | {"file": place.file, "begin": place.begin})
            tensors[name] = {"shape": list(stored.size), "boxes": boxes}
        manifest = {"format": FORMAT, **self._header, "files": files, "tensors": tensors}
        text = json.dumps(manifest).encode()
        self._store.put(f"{self._relative}/{MANIFEST}", text)
        self.manifest_digest = hashlib.sha256(text).hexdigest()

    def reset(self, checkpoint_id=None) -> None: ...
    def set_up_storage_writer(self, is_coordinator: bool, *args, **kwargs) -> None:
        self._fs.makedirs(self._folder, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


class BoxReader(StorageReader):
    def __init__(self, store: Store, folder: str, manifest: dict):
        self._fs, self._folder = fsspec.core.url_to_fs(store.path(folder))
        self._tensors = manifest["tensors"]

    def read_metadata(self, *args, **kwargs) -> Metadata:
        properties = TensorProperties(dtype=torch.float32)
        state, places = {}, {}
        for name, tensor in self._tensors.items():
            chunks = []
            for box in tensor["boxes"]:
                chunk = ChunkStorageMetadata(torch.Size(box["offset"]), torch.Size(box["shape"]))
                chunks.append(chunk)
                places[MetadataIndex(name, chunk.offsets)] = box
            state[name] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), chunks)
        return Metadata(state_dict_metadata=state, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args, **kwargs) -> None:
        self._places = metadata.storage_data

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            stored = self.read_box(self._places[item.storage_index])
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                stored = stored.narrow(dim, start, length)
            planner.resolve_tensor(item).detach().copy_(stored)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def read_box(self, box: dict) -> Tensor:
        shape = torch.Size(box["shape"])
        end = box["begin"] + shape.numel() * torch.float32.itemsize
        data = self._fs.cat_file(f"{self._folder}/{box['file']}", box["begin"], end)
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape)

    def read_tensor(self, name: str) -> Tensor:
        """One logical tensor, whole."""
        full = torch.empty(self._tensors[name]["shape"])
        for box in self._tensors[name]["boxes"]:
            part = full
            for dim, (start, length) in enumerate(zip(box["offset"], box["shape"], strict=True)):
                part = part.narrow(dim, start, length)
            part.copy_(self.read_box(box))
        return full

    def reset(self, checkpoint_id=None) -> None: ...
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


def _key(index: MetadataIndex) -> str:
    return f"{index.fqn}@{','.join(map(str, index.offset))}"
