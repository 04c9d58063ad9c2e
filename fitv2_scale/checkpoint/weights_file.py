"""The tensors in a file of weights, .safetensors or of torch.save: where each lies, so that they are read one by one.

Nothing is unpickled.
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_sharding.errors import UserError
from fitv2_scale.checkpoint.pickle_outline import TensorOutline, kind_of, outline
from fitv2_scale.run.weights_source import SUFFIXES

# Keys of training checkpoints under which weights lie, averaged ones first.
_BY_PREFERENCE = (
    *("ema", "model_ema", "ema_model", "params_ema", "ema_state_dict"),
    *("state_dict", "model", "model_state_dict", "params", "module", "network", "net"),
)
_BEFORE_1_6 = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # the number that files then began with
_FIRST_BYTES, _SHOWN_BYTES = 64, 20
_LOCAL_HEADER, _NAME_LENGTH = 30, 26  # of a record in an archive: bytes, and where the lengths of its texts stand


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; ``read`` reads it."""

    shape: tuple[int, ...]
    dtype: str  # as in "torch.float32"
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class TensorFile:
    """A file's tensors by name. ``part`` is the key under which a training checkpoint has them; else it is empty."""

    tensors: dict[str, Stored]
    part: str = ""


def open_tensors(file: str) -> TensorFile:
    """The file's tensors; of a training checkpoint those of its averaged weights, if it has any. Raises UserError if it
    is no file of tensors."""
    if not Path(file).is_file():
        raise UserError(f"there is no weights file {file}")
    if not file.endswith(SUFFIXES):
        raise UserError(f"{file}: weights come as .safetensors, .bin or .pt")
    try:
        if file.endswith(".safetensors") or _looks_like_safetensors(file):
            return TensorFile(_open_safetensors(file))
    except SafetensorError as error:
        raise UserError(f"{file} is not a complete .safetensors file ({error}): fetch it again") from error
    _refuse_other_formats(file)
    try:
        with zipfile.ZipFile(file) as archive:
            return _open_archive(file, archive)
    except (ValueError, IndexError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} does not load as plain tensors ({error}): fetch it again") from error


def _looks_like_safetensors(file: str) -> bool:
    """Whatever its suffix: versions up to a2e80d5 exported under any name."""
    with open(file, "rb") as raw:
        length, first = int.from_bytes(raw.read(8), "little"), raw.read(1)
    return first == b"{" and 8 + length <= Path(file).stat().st_size


def _refuse_other_formats(file: str) -> None:
    """Raises UserError unless the file is an archive, as torch.save writes it."""
    if zipfile.is_zipfile(file):
        return
    with open(file, "rb") as raw:
        first = raw.read(_FIRST_BYTES)
    if _BEFORE_1_6 in first:
        raise UserError(
            f"{file} is in the format of torch before 1.6: load it with torch, save it again with torch.save, and give "
            "that file"
        )
    if first.startswith(b"PK"):
        raise UserError(f"{file} is not complete: fetch it again")
    begin = first[:_SHOWN_BYTES].decode(errors="replace")
    raise UserError(f"{file} is no file of torch.save or safetensors, it begins with {begin!r}: fetch it again")


def _open_archive(file: str, archive: zipfile.ZipFile) -> TensorFile:
    """Raises UserError, and ValueError, IndexError, OSError or BadZipFile if it is damaged."""
    records = {record.filename: record for record in archive.infolist()}
    if any(name.endswith("/constants.pkl") for name in records):
        raise UserError(f"{file} is a TorchScript program: save its state_dict() and give that file")
    name = next((name for name in records if name.endswith("data.pkl")), None)
    if name is None:
        raise ValueError("it has no data.pkl")
    folder, size = name.removesuffix("data.pkl"), Path(file).stat().st_size
    if (order := records.get(f"{folder}byteorder")) and _read_record(file, order, size) != b"little":
        raise UserError(f"{file} was written on a machine with another order of bytes: save it as .safetensors there")
    part, weights = _where_weights_lie(file, outline(_read_record(file, records[name], size)))
    found = {key: _stored(file, size, records.get(f"{folder}data/{t.storage}"), t) for key, t in weights.items()}
    return TensorFile(found, part)


def _where_weights_lie(file: str, tree: Any) -> tuple[str, dict[str, TensorOutline]]:
    """The dictionary of tensors, and its dotted key in a training checkpoint, as in {"model": {…}, "ema": {…}, "opt":
    {…}}: the most preferred one, or else the uppermost."""
    if not isinstance(tree, dict):
        raise UserError(f"{file} does not load as plain tensors (it holds a {kind_of(tree)}): it is refused")
    known = next((key for key in _BY_PREFERENCE if isinstance(tree.get(key), dict) and tree[key]), None)
    found = dict(_of_tensors(tree if known is None else {known: tree[known]}))
    least = min((key.count(".") for key in found), default=0)
    if not (uppermost := [key for key in found if key.count(".") == least]):
        odd = (f"{k!r} is a {kind_of(v)}" for k, v in tree.items() if not isinstance(v, TensorOutline))
        what = next(odd, "its keys are no names")
        raise UserError(f"{file} does not load as plain tensors ({what}): it is refused")
    if len(uppermost) > 1:
        keys = " or ".join(f"'{key}'" for key in uppermost)
        raise UserError(
            f"{file} is a training checkpoint: its weights lie under {keys}; save these alone as .safetensors and "
            "import that file"
        )
    return uppermost[0], found[uppermost[0]]


def _of_tensors(tree: dict[Any, Any]) -> Iterator[tuple[str, dict[str, TensorOutline]]]:
    """The dictionaries in ``tree``, and itself, that hold tensors under names and nothing else, by their dotted keys.
    Each is looked at once: one may hold another many times, or itself."""
    waiting, seen = [("", tree)], {id(tree)}
    for prefix, each in waiting:
        if each and all(isinstance(k, str) and isinstance(v, TensorOutline) for k, v in each.items()):
            yield prefix, each
        for key, value in each.items():
            if isinstance(key, str) and isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{prefix}.{key}" if prefix else key, value))


def _stored(file: str, size: int, record: zipfile.ZipInfo | None, tensor: TensorOutline) -> Stored:
    """The tensor whose values ``record`` has. Raises ValueError unless the file has all of them."""
    if record is None:
        raise ValueError(f"record {tensor.storage} is missing")
    shape, strides, item = tensor.shape, tensor.strides, torch.float32.itemsize
    if tensor.dtype == "torch.float32" and (tensor.offset + _extent(shape, strides)) * item > record.file_size:
        raise ValueError(f"record {tensor.storage} is too short")
    begin = _begin_of(file, record, size) + tensor.offset * item
    return Stored(shape, tensor.dtype, lambda: _read(file, begin, shape, strides))


def _begin_of(file: str, record: zipfile.ZipInfo, size: int) -> int:
    """Where the bytes of a record begin. Raises ValueError unless they are in the file as they are."""
    with open(file, "rb") as raw:
        raw.seek(record.header_offset)
        header = raw.read(_LOCAL_HEADER)
    lengths = (int.from_bytes(header[at : at + 2], "little") for at in (_NAME_LENGTH, _NAME_LENGTH + 2))
    begin = record.header_offset + _LOCAL_HEADER + sum(lengths)
    if record.compress_type != zipfile.ZIP_STORED or begin + record.file_size > size:
        raise ValueError(f"record {record.filename} is compressed or not complete")
    return begin


def _read_record(file: str, record: zipfile.ZipInfo, size: int) -> bytes:
    with open(file, "rb") as raw:
        raw.seek(_begin_of(file, record, size))
        return raw.read(record.file_size)


def _open_safetensors(file: str) -> dict[str, Stored]:
    # The library checks the file, but reads by mapping it, which keeps all that was read in memory.
    with safe_open(file, framework="pt") as opened:
        dtypes = {name: _name_of(opened.get_slice(name).get_dtype()) for name in opened.keys()}  # noqa: SIM118
    with open(file, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    found = {}
    for name, dtype in dtypes.items():
        shape, begin = tuple(header[name]["shape"]), 8 + length + header[name]["data_offsets"][0]
        found[name] = Stored(shape, dtype, lambda b=begin, s=shape: _read(file, b, s, _strides(s)))
    return found


def _read(file: str, begin: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """A float32 tensor whose first element lies ``begin`` bytes into ``file``."""
    data = bytearray(_extent(shape, strides) * torch.float32.itemsize)
    with open(file, "rb") as raw:
        raw.seek(begin)
        if raw.readinto(data) != len(data):
            raise UserError(f"{file} ends too early: fetch it again")
    flat = torch.frombuffer(data, dtype=torch.float32) if data else torch.empty(0)
    return flat.as_strided(shape, strides)


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last, both included."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _name_of(dtype: str) -> str:
    return {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}.get(dtype, dtype)
