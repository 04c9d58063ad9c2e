"""Writes a .safetensors file as a stream: one tensor in memory at a time, with digests of what is written.

The library's own ``save_file`` takes all tensors at once and writes to local paths only. The format is a little-endian
u64 length, that many bytes of JSON header padded with spaces, then the tensors' bytes; any reader of the format, the
library's included, reads what is written here.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_sharding.storage.store import Store
from fitv2_scale.checkpoint.checksums import ChunkDigests

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor to write. ``read`` is called once, when the tensor is written, perhaps in another thread."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    bytes: int
    xxh3_128: list[str]  # of each chunk of the file (see ``checksums``)
    begins: dict[str, int]  # key -> offset of the tensor's first byte in the file


def head_of(entries: Sequence[TensorToWrite], metadata: dict[str, str] | None = None) -> tuple[bytes, dict[str, int]]:
    """What a file of ``entries`` holds before the tensors, and the offset of each tensor's first byte in the file."""
    header: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
    begins, at = {}, 0
    for e in entries:
        header[e.key] = {"dtype": _DTYPES[e.dtype], "shape": list(e.shape), "data_offsets": [at, at + e.nbytes]}
        begins[e.key], at = at, at + e.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    head = len(text).to_bytes(8, "little") + text
    return head, {key: len(head) + begin for key, begin in begins.items()}


def write_safetensors(
    store: Store, path: str, entries: Sequence[TensorToWrite], metadata: dict[str, str] | None = None
) -> Written:
    """Writes ``entries`` in their order. When this returns, the file is durable; if it fails, there is no file."""
    head, begins = head_of(entries, metadata)
    size = len(head) + sum(e.nbytes for e in entries)
    digests = ChunkDigests()
    with store.writing(path, size) as file:
        file.write(head)
        digests.update(head)
        for e in entries:
            tensor = e.read().detach().contiguous().cpu()
            assert tensor.dtype == e.dtype and tuple(tensor.shape) == e.shape
            data = tensor.flatten().view(torch.uint8).numpy().data
            digests.update(data)
            file.write(data)
    return Written(size, digests.hexdigests(), begins)
