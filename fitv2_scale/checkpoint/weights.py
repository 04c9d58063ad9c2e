"""Import and export of public weights. Logical names are the public names, so no tensor is renamed or changed.

Both are streams, one tensor at a time: memory does not grow with the file.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data_sharding.errors import UserError
from data_sharding.storage.open_store import open_store
from fitv2_scale.checkpoint.checksums import Damaged
from fitv2_scale.checkpoint.commit import commit_folder, read_manifest
from fitv2_scale.checkpoint.commit_files import CommitReader, box_record, file_record, write_manifest
from fitv2_scale.checkpoint.safetensors_file import TensorToWrite, write_safetensors
from fitv2_scale.checkpoint.weights_file import Stored, open_tensors
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.config.schema import Config
from fitv2_scale.identity import open_run
from fitv2_scale.model.counts import logical_shapes
from fitv2_scale.run.provenance import provenance
from fitv2_scale.run.run import Run

_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile, in any order


class WrongWeights(UserError):
    """The file's tensors are not the network's: ``missing`` from the file, or ``left_over`` in it, by name."""

    def __init__(self, message: str, missing: list[str], left_over: list[str]):
        super().__init__(message)
        self.missing, self.left_over = missing, left_over


def open_weights(file: str, model: ModelConfig) -> dict[str, Stored]:
    """The file's tensors by their names in the network, none read yet. What wrappers of torch put before all names is
    left out.

    Raises:
        UserError: not a weights file, or names, shapes or types that are not exactly those of ``model``.
    """
    expected = logical_shapes(model)
    tensors = _without_prefix(open_tensors(file), expected)
    _check(file, tensors, expected)
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
    text = json.dumps(logical).encode()
    attempt.commit(0, folder, write_manifest(run.store, folder, header, {data: file_record(written)}, text))
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


def _without_prefix(tensors: dict[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """``tensors`` under the names that are ``expected``, if they have these behind one prefix of wrappers."""
    short = tensors
    while found := [prefix for prefix in _WRAPPERS if short and all(name.startswith(prefix) for name in short)]:
        short = {name.removeprefix(found[0]): stored for name, stored in short.items()}
    return short if short.keys() == expected.keys() else tensors


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
