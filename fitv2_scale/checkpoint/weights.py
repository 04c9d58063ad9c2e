"""Public weights in and out: logical names are the public names, so both ways are the identity."""

from pathlib import Path

import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_sharding.errors import UserError
from fitv2_scale.checkpoint.checkpointer import commit_folder, read_manifest, verify_commit, write_commit
from fitv2_scale.checkpoint.safetensors_file import Entry, write_safetensors
from fitv2_scale.checkpoint.storage import BoxReader
from fitv2_scale.config import Config
from fitv2_scale.model.counts import logical_shapes
from fitv2_scale.parallel.boxes import Box, LogicalTensor
from fitv2_scale.run import Run, provenance


def import_weights(file: str, run_url: str, config: Config) -> Run:
    """Makes a RUN whose first commit, at step 0, holds the file's float32 tensors as weights and as EMA.

    Raises:
        UserError: not a weights file, or names or shapes that are not exactly those of ``config.model``.
    """
    tensors = _read(file)
    _check(file, tensors, logical_shapes(config.model))
    run = Run.open_or_create(run_url, config.model_dump(mode="json"), config.science(), plan_hash=None)
    if run.log.commits():
        raise UserError(f"{run_url} has commits already: import into a new run folder")
    attempt = run.claim(provenance())
    folder = commit_folder(0, attempt.number)
    logical = {
        f"{kind}/{name}": LogicalTensor(tuple(t.shape), [Box((0,) * t.dim(), t)])
        for kind in ("param", "ema")
        for name, t in tensors.items()
    }
    header = {"step": 0, "attempt": attempt.number, "cursor": None, "scalars": {}}
    writer = write_commit(run, folder, 0, header, logical, group=None)
    attempt.commit(0, folder, writer.manifest_digest)
    attempt.end(0, f"imported {file}")
    return run


def export_weights(run_url: str, file: str, ema: bool, step: int | None = None) -> int:
    """Writes the weights of the newest commit (or the one at ``step``) as .safetensors; returns their step."""
    run = Run.open(run_url)
    entries = [e for e in run.log.commits() if step is None or e.fields["step"] == step]
    if not entries:
        raise UserError(f"{run_url} has no commit" + ("" if step is None else f" at step {step}"))
    entry = entries[-1]
    if problems := verify_commit(run, entry):
        raise UserError(
            f"the commit at step {entry.fields['step']} is not whole ({problems[0]}): choose another --step"
        )
    manifest = read_manifest(run, entry)
    reader, kind = BoxReader(run.store, entry.fields["path"], manifest), "ema/" if ema else "param/"
    names = [name for name in manifest["tensors"] if name.startswith(kind)]
    written = [
        Entry(
            name.removeprefix(kind),
            torch.float32,
            tuple(manifest["tensors"][name]["shape"]),
            lambda name=name: reader.read_tensor(name),
        )
        for name in names
    ]
    path = Path(file).absolute()
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist: make it first")
    write_safetensors(LocalFileSystem(), str(path), written, metadata={"format": "pt"})
    return manifest["step"]


def _read(file: str) -> dict[str, Tensor]:
    """Name -> tensor, mapped from the file. Nothing but tensors is unpickled."""
    if not Path(file).is_file():
        raise UserError(f"there is no weights file {file}")
    try:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        if file.endswith((".bin", ".pt", ".pth")):
            return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except SafetensorError as error:
        raise UserError(f"{file} is not a whole .safetensors file ({error}): fetch it again") from error
    except Exception as error:  # torch.load has no exception of its own for a damaged or malicious file
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} does not load as plain tensors ({reason}): it is refused") from error
    raise UserError(f"{file}: weights come as .safetensors or .bin")


def _check(file: str, tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    missing, left_over = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or left_over:
        raise UserError(
            f"{file} is not this network: {len(missing)} tensors are missing ({_some(missing)}) and "
            f"{len(left_over)} are left over ({_some(left_over)}): choose the config of these weights"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{file}: {name} is {tuple(tensors[name].shape)}, the config wants {shape}: choose another config"
            )
        if tensors[name].dtype != torch.float32:
            raise UserError(f"{file}: {name} is {tensors[name].dtype}, but only float32 weights are imported")


def _some(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
