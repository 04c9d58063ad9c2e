"""The tensors in a file of weights, .safetensors or of torch.save: where each lies, so that they are read one by one.

Nothing but tensors is unpickled.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_sharding.errors import UserError
from fitv2_scale.checkpoint.pickle_outline import TENSOR, outline
from fitv2_scale.run.weights_source import SUFFIXES

# Keys of training checkpoints under which weights lie, averaged ones first.
_BY_PREFERENCE = (
    *("ema", "model_ema", "ema_model", "params_ema", "ema_state_dict"),
    *("state_dict", "model", "model_state_dict", "params", "module", "network", "net"),
)
_BEFORE_1_6 = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # the number that files then began with
_FIRST_BYTES, _SHOWN_BYTES = 64, 20
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; ``read`` reads it."""

    shape: tuple[int, ...]
    dtype: str  # as in "torch.float32"
    read: Callable[[], Tensor]


def open_tensors(file: str) -> dict[str, Stored]:
    """The file's tensors by name. Raises UserError if it is no file of tensors."""
    if not Path(file).is_file():
        raise UserError(f"there is no weights file {file}")
    if not file.endswith(SUFFIXES):
        raise UserError(f"{file}: weights come as .safetensors or .bin")
    try:
        if file.endswith(".safetensors") or _looks_like_safetensors(file):
            return _open_safetensors(file)
    except SafetensorError as error:
        raise UserError(f"{file} is not a complete .safetensors file ({error}): fetch it again") from error
    _refuse_other_formats(file)
    if found := _where_weights_lie(file):
        keys = " or ".join(f"'{key}'" for key in found)
        raise UserError(
            f"{file} is a training checkpoint: its weights lie under {keys}; save these alone as .safetensors and "
            "import that file"
        )
    try:
        return _open_pickled(file)
    except UserError:
        raise
    except Exception as error:  # torch.load has no exception of its own for a damaged or malicious file
        raise UserError(f"{file} does not load as plain tensors ({_reason(error)}): it is refused") from error


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


def _where_weights_lie(file: str) -> list[str]:
    """The keys of a training checkpoint, as in {"model": {…}, "ema": {…}, "opt": {…}}, under which its weights may be:
    one that is known, or the uppermost that have tensors alone; none for another file."""
    try:
        keys = outline(file) or {}
    except (ValueError, IndexError, OSError, zipfile.BadZipFile):
        return []  # damaged: torch.load has the reason
    known = [key for key in _BY_PREFERENCE if isinstance(keys.get(key), dict) and keys[key]]
    found = list(_of_tensors(keys, ""))
    return known[:1] or [key for key in found if key.count(".") == min(other.count(".") for other in found)]


def _of_tensors(tree: dict[str, Any], prefix: str) -> Iterator[str]:
    """The dotted keys of the dictionaries in ``tree`` that hold tensors, and nothing else."""
    for key, value in tree.items():
        if isinstance(value, dict):
            if value and all(each is TENSOR for each in value.values()):
                yield f"{prefix}{key}"
            yield from _of_tensors(value, f"{prefix}{key}.")


def _reason(error: Exception) -> str:
    """Why torch.load refuses a file, without its advice to load it all the same."""
    text = _ANSI.sub("", str(error))
    if found := re.search(r"nsupported (?:global: )?GLOBAL (\S+)", text):
        return f"it holds objects of the class {found[1]}"
    lines = [line for line in text.splitlines() if line.strip() and "weights_only" not in line]
    return (lines or [type(error).__name__])[0]


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


def _open_pickled(file: str) -> dict[str, Stored]:
    found = {}
    with zipfile.ZipFile(file) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise UserError(f"{file} is a TorchScript program: save its state_dict() and give that file")
    loaded = torch.load(file, map_location="meta", weights_only=True)  # meta: reads no data
    if not isinstance(loaded, dict):
        raise UserError(f"{file} does not load as plain tensors (it holds a {type(loaded).__name__}): it is refused")
    for name, value in loaded.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            what = f"{name!r} is a {type(value).__name__}"
            raise UserError(f"{file} does not load as plain tensors ({what}): it is refused")
        tensor: Any = value  # an attribute of its storage is private
        begin = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.itemsize
        shape, strides = tuple(tensor.shape), tensor.stride()
        found[name] = Stored(shape, str(tensor.dtype), lambda b=begin, s=shape, t=strides: _read(file, b, s, t))
    return found


def _read(file: str, begin: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """A float32 tensor whose first element lies ``begin`` bytes into ``file``."""
    count = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0
    data = bytearray(count * torch.float32.itemsize)
    with open(file, "rb") as raw:
        raw.seek(begin)
        if raw.readinto(data) != len(data):
            raise UserError(f"{file} ends too early: fetch it again")
    flat = torch.frombuffer(data, dtype=torch.float32) if data else torch.empty(0)
    return flat.as_strided(shape, strides)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _name_of(dtype: str) -> str:
    return {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}.get(dtype, dtype)
