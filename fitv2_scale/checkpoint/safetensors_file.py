"""Writing a .safetensors file as a stream: one tensor in memory at a time, its digest taken on the way.

The library's own ``save_file`` wants all tensors at once and writes to local paths only. The format is a little-endian
u64 length, that many bytes of JSON header padded with spaces, then the tensors' bytes; any reader of the format, the
library's included, reads what is written here.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import fsspec
import torch
import xxhash
from torch import Tensor

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


@dataclass(frozen=True)
class Entry:
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
    xxh3_128: str
    begins: dict[str, int]  # key -> offset of the tensor's first byte in the file


def write_safetensors(
    fs: fsspec.AbstractFileSystem, path: str, entries: Sequence[Entry], metadata: dict[str, str] | None = None
) -> Written:
    """Writes ``entries`` in their order. On a local disk the file is on the platter when this returns."""
    header, begins, at = {"__metadata__": metadata} if metadata else {}, {}, 0
    for e in entries:
        header[e.key] = {"dtype": _DTYPES[e.dtype], "shape": list(e.shape), "data_offsets": [at, at + e.nbytes]}
        begins[e.key], at = at, at + e.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    head = len(text).to_bytes(8, "little") + text
    digest = xxhash.xxh3_128(head)
    with fs.open(path, "wb") as file:
        file.write(head)
        for e in entries:
            tensor = e.read().detach().contiguous().cpu()
            assert tensor.dtype == e.dtype and tuple(tensor.shape) == e.shape
            data = memoryview(tensor.flatten().view(torch.uint8).numpy())
            digest.update(data)
            file.write(data)
        file.flush()
        if hasattr(file, "fileno"):
            os.fsync(file.fileno())
    return Written(len(head) + at, digest.hexdigest(), {key: len(head) + b for key, b in begins.items()})


def file_digest(fs: fsspec.AbstractFileSystem, path: str) -> tuple[int, str]:
    """(bytes, xxh3_128) of a stored file. Raises FileNotFoundError."""
    digest, size = xxhash.xxh3_128(), 0
    with fs.open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()
