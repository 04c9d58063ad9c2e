"""Import and export of public weights. Logical names are the public names, so no tensor is renamed or changed.

Both are streams, one tensor at a time: memory does not grow with the file.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_sharding.errors import UserError
from data_sharding.storage.open_store import open_store
from fitv2_scale.checkpoint.checksums import Damaged
from fitv2_scale.checkpoint.commit import commit_folder, read_manifest
from fitv2_scale.checkpoint.dcp_storage import CommitReader, box_record, write_manifest
from fitv2_scale.checkpoint.pickle_outline import outline
from fitv2_scale.checkpoint.safetensors_file import TensorToWrite, write_safetensors
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.config.schema import Config
from fitv2_scale.identity import open_run
from fitv2_scale.model.counts import logical_shapes
from fitv2_scale.run.provenance import provenance
from fitv2_scale.run.run import Run
from fitv2_scale.run.weights_source import SUFFIXES


class WrongWeights(UserError):
    """The file's tensors are not the network's: ``missing`` from the file, or ``left_over`` in it, by name."""

    def __init__(self, message: str, missing: list[str], left_over: list[str]):
        super().__init__(message)
        self.missing, self.left_over = missing, left_over


# Keys of training checkpoints under which weights lie, averaged ones first.
_BY_PREFERENCE = (
    *("ema", "model_ema", "ema_model", "params_ema", "ema_state_dict"),
    *("state_dict", "model", "model_state_dict", "params", "module", "network", "net"),
)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; ``read`` reads it."""

    shape: tuple[int, ...]
    dtype: str  # as in "torch.float32"
    read: Callable[[], Tensor]


def open_weights(file: str, model: ModelConfig) -> dict[str, Stored]:
    """The file's tensors by their names, none read yet.

    Raises:
        UserError: not a weights file, or names, shapes or types that are not exactly those of ``model``.
    """
    tensors = _open(file)
    _check(file, tensors, logical_shapes(model))
    return tensors


def import_weights(file: str, run_url: str, config: Config) -> Run:
    """Makes a run whose first commit, at step 0, holds the file's float32 tensors as weights and as EMA.

    Raises:
        UserError: not a weights file, names or shapes that are not exactly those of ``config.model``, or values that
            are not finite.
    """
    tensors = open_weights(file, config.model)
    for _ in read_finite(file, tensors):
        pass  # before anything is written
    run = open_run(config.model_copy(update={"run": run_url}), plan=None)
    if run.log.commits():
        raise UserError(f"{run_url} has commits already: import into a new run folder")
    attempt = run.claim(provenance())
    folder, data = commit_folder(0, attempt.number), "rank-00000.safetensors"
    entries = [TensorToWrite(name, torch.float32, stored.shape, stored.read) for name, stored in tensors.items()]
    written = write_safetensors(run.store, f"{folder}/{data}", entries)
    logical = {  # weights and EMA are the same bytes
        f"{kind}/{name}": {
            "shape": list(stored.shape),
            "boxes": [box_record([0] * len(stored.shape), stored.shape, data, written.begins[name])],
        }
        for kind in ("param", "ema")
        for name, stored in tensors.items()
    }
    header = {"step": 0, "attempt": attempt.number, "cursor": None, "scalars": {}, "moments": []}
    attempt.commit(0, folder, write_manifest(run.store, folder, header, {data: written}, logical))
    attempt.end(0, f"imported {file}")
    return run


def export_weights(run_url: str, file: str, ema: bool, step: int | None = None) -> int:
    """Writes the weights of the newest commit (or the one at ``step``) as .safetensors; returns their step.

    ``file`` is a local path or an s3:// URL. It appears once it is complete.
    """
    if not file.endswith(".safetensors"):
        raise UserError(f"{file}: weights are written as .safetensors, give a name that ends so")
    run = Run.open(run_url)
    entries = [e for e in run.log.commits() if step is None or e.fields["step"] == step]
    if not entries:
        raise UserError(f"{run_url} has no commit" + ("" if step is None else f" at step {step}"))
    folder, _, name = file.rpartition("/")
    if not file.startswith("s3://") and not Path(folder or ".").is_dir():
        raise UserError(f"the folder {Path(folder).absolute()} does not exist: make it first")
    entry, kind = entries[-1], "ema/" if ema else "param/"
    try:
        manifest = read_manifest(run, entry)
        reader = CommitReader(run.store, entry.fields["path"], manifest)
        written = [
            TensorToWrite(
                key.removeprefix(kind), torch.float32, tuple(tensor["shape"]), partial(reader.read_tensor, key)
            )
            for key, tensor in manifest["tensors"].items()
            if key.startswith(kind)
        ]
        write_safetensors(open_store(folder or "."), name, written, metadata={"format": "pt"})
    except Damaged as error:
        raise UserError(
            f"the commit at step {entry.fields['step']} is damaged ({error}): choose another --step"
        ) from error
    return manifest["step"]


def _open(file: str) -> dict[str, Stored]:
    """The file's tensors. Nothing but tensors is unpickled."""
    if not Path(file).is_file():
        raise UserError(f"there is no weights file {file}")
    if not file.endswith(SUFFIXES):
        raise UserError(f"{file}: weights come as .safetensors or .bin")
    try:
        if file.endswith(".safetensors") or _looks_like_safetensors(file):
            return _open_safetensors(file)
    except SafetensorError as error:
        raise UserError(f"{file} is not a complete .safetensors file ({error}): fetch it again") from error
    if (found := _where_weights_lie(file)) is not None:
        raise UserError(
            f"{file} is a training checkpoint: its weights lie under '{found}'; save these alone as .safetensors and "
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


def _where_weights_lie(file: str) -> str | None:
    """The key of a training checkpoint, as in {"model": {…}, "ema": {…}, "opt": {…}}, under which its weights are; None
    for another file."""
    try:
        keys = outline(file) or {}
    except (ValueError, IndexError, OSError, zipfile.BadZipFile):
        return None  # damaged: torch.load has the reason
    return next((key for key in _BY_PREFERENCE if isinstance(keys.get(key), dict) and keys[key]), None)


def _reason(error: Exception) -> str:
    """Why torch.load refuses a file, without its advice to load it all the same."""
    text = _ANSI.sub("", str(error))
    if found := re.search(r"Unsupported global: GLOBAL (\S+)", text):
        return f"it holds objects of the class {found[1]}"
    return (text.splitlines() or [type(error).__name__])[0]


def read_finite(file: str, tensors: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Reads the tensors one by one. Raises UserError after the last if any has a NaN or an infinity."""
    bad = {}
    for name, stored in tensors.items():
        tensor = stored.read()
        if count := tensor.numel() - int(tensor.isfinite().sum()):
            bad[name] = count
        yield name, tensor
    if bad:
        raise UserError(
            f"{file}: {sum(bad.values())} values of {len(bad)} tensors are NaN or infinite ({_some(list(bad))}), and "
            "every image would be: fetch the file again, or take weights of an earlier step"
        )


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


def _check(file: str, tensors: dict[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> None:
    missing, left_over = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or left_over:
        raise WrongWeights(
            f"{file} is not this network: {len(missing)} tensors are missing ({_some(missing)}) and "
            f"{len(left_over)} are left over ({_some(left_over)}): choose the config of these weights; "
            "`fitv2 checkpoint import … --json` lists them all",
            missing,
            left_over,
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(f"{file}: {name} is {tensors[name].shape}, the config wants {shape}: choose another config")
        if tensors[name].dtype != "torch.float32":
            raise UserError(f"{file}: {name} is {tensors[name].dtype}, but only float32 weights are imported")


def _some(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
