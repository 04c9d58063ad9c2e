"""Import and export of public weights, in the layouts of ``public_layouts``.

Both are streams, one tensor at a time: memory does not grow with the file.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from data_sharding.errors import UserError
from data_sharding.storage.open_store import open_store
from fitv2_scale.checkpoint.checksums import Damaged
from fitv2_scale.checkpoint.commit import commit_folder, read_manifest
from fitv2_scale.checkpoint.commit_files import CommitReader, box_record, file_record, write_manifest
from fitv2_scale.checkpoint.public_layouts import (
    LAYOUTS,
    Layout,
    Piece,
    check_table,
    layout_of,
    pieces,
    shown_by,
    table_of,
)
from fitv2_scale.checkpoint.safetensors_file import TensorToWrite, write_safetensors
from fitv2_scale.checkpoint.weights_file import Stored, open_tensors
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.config.schema import Config
from fitv2_scale.identity import open_run
from fitv2_scale.model.counts import logical_shapes
from fitv2_scale.run.provenance import provenance
from fitv2_scale.run.run import Run

_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile, in any order
_INIT_NEW = "; in training, init_new names tensors that are drawn instead of loaded"


class WrongWeights(UserError):
    """The file's tensors are not the network's: ``missing`` from the file, or ``left_over`` in it, by name."""

    def __init__(self, message: str, missing: Sequence[str] = (), left_over: Sequence[str] = ()):  # as in RankLost
        super().__init__(message)
        self.missing, self.left_over = list(missing), list(left_over)


@dataclass(frozen=True)
class PublicWeights:
    """A file's tensors by their names in the network, none read yet; the part of a training checkpoint that they are,
    or ""; and the file's layout."""

    tensors: dict[str, Stored]
    part: str
    layout: str

    @property
    def origin(self) -> str:
        """What of a file they are, as in a sentence after its name."""
        part = [f"its part '{self.part}'"] if self.part else []
        return f" ({', '.join([*part, f'layout {self.layout}'])})"


@dataclass(frozen=True)
class Imported:
    run: Run
    weights: PublicWeights


def open_weights(file: str, model: ModelConfig, new: Collection[str] = ()) -> PublicWeights:
    """The weights in a file of any layout. What wrappers of torch put before all names is left out, and so are the
    tensors ``new`` of the network, of which the file may have others, or none.

    Raises:
        UserError: not a weights file, or names, shapes or types that are not exactly those of ``model``.
    """
    opened = open_tensors(file)
    tensors = _without_prefix(opened.tensors)
    layout = layout_of(tensors)
    wanted = pieces(layout, model, logical_shapes(model))
    _check(file, tensors, layout, model, wanted, new)
    if layout.table:
        check_table(file, layout.table, tensors[layout.table], model)
    found = {
        name: Stored(piece.shape, "torch.float32", partial(piece.read, file, tensors))
        for name, piece in sorted(wanted.items())
        if name not in new
    }
    return PublicWeights(found, opened.part, layout.name)


def import_weights(file: str, run_url: str, config: Config) -> Imported:
    """Makes a run whose first commit, at step 0, holds the file's float32 tensors as weights and as EMA.

    Raises:
        UserError: not a weights file, names or shapes that are not exactly those of ``config.model``, or values that
            are not finite.
    """
    weights = open_weights(file, config.model)
    tensors = weights.tensors
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
    attempt.end(0, f"imported {file}{weights.origin}")
    return Imported(run, weights)


def export_weights(run_url: str, file: str, ema: bool, step: int | None = None, layout: str = "fit") -> int:
    """Writes the weights of the newest commit (or the one at ``step``) as .safetensors, in one of ``LAYOUTS``; returns
    their step.

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
    model = _model_for(run, LAYOUTS[layout]) if LAYOUTS[layout].model else None
    entry, kind = entries[-1], "ema/" if ema else "param/"
    try:
        manifest = read_manifest(run, entry)
        reader = CommitReader(run.store, entry.fields["path"], manifest)
        shapes = {k.removeprefix(kind): tuple(t["shape"]) for k, t in manifest["tensors"].items() if k.startswith(kind)}
        if model is None:  # nothing changes, whatever network it is
            written = [
                TensorToWrite(name, torch.float32, shape, partial(reader.read_tensor, f"{kind}{name}"))
                for name, shape in shapes.items()
            ]
        else:
            written = _in_layout(LAYOUTS[layout], model, shapes, lambda name: reader.read_tensor(f"{kind}{name}"))
        write_safetensors(open_store(folder or "."), name, written, metadata={"format": "pt"})
    except Damaged as error:
        raise UserError(
            f"the commit at step {entry.fields['step']} is damaged ({error}): choose another --step"
        ) from error
    return manifest["step"]


def _model_for(run: Run, layout: Layout) -> ModelConfig:
    """The section ``model`` of ``run``. Raises UserError if its network has no such layout."""
    model = ModelConfig.model_validate(run.config["model"])
    if odd := [f"model.{k} is {getattr(model, k)}, not {v}" for k, v in layout.model.items() if getattr(model, k) != v]:
        raise UserError(f"{run.url} is not of the layout {layout.name} ({', '.join(odd)}): leave out --format")
    return model


def _in_layout(
    layout: Layout, model: ModelConfig, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]
) -> list[TensorToWrite]:
    """The tensors of ``shapes``, which ``read`` reads by name, as a file of ``layout`` has them."""

    def read_part(piece: Piece, public: str) -> Tensor:
        return piece.part(public, read(piece.name))

    written = [
        TensorToWrite(public, torch.float32, shape, partial(read_part, piece, public))
        for piece in pieces(layout, model, shapes).values()
        for public, shape in piece.public.items()
    ]
    if layout.table:
        shape = (1, model.sincos.train_side**2, model.hidden)
        written.append(TensorToWrite(layout.table, torch.float32, shape, partial(table_of, model)))
    return written


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


def _without_prefix(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """``tensors`` without what wrappers put before all of their names."""
    while found := [prefix for prefix in _WRAPPERS if tensors and all(name.startswith(prefix) for name in tensors)]:
        tensors = {name.removeprefix(found[0]): stored for name, stored in tensors.items()}
    return tensors


def _check(
    file: str,
    tensors: Mapping[str, Stored],
    layout: Layout,
    model: ModelConfig,
    wanted: Mapping[str, Piece],
    new: Collection[str],
) -> None:
    """Raises UserError unless the file has the tensors of ``wanted``, and no others; of those that are ``new`` any or
    none."""
    expected = {public: shape for n, piece in wanted.items() if n not in new for public, shape in piece.public.items()}
    if layout.table:
        expected[layout.table] = (1, model.sincos.train_side**2, model.hidden)
    may_have = {public for name in new for public in wanted[name].public}
    missing, left_over = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys() - may_have)
    shown = shown_by(layout, tensors, new)
    here = {key: attrgetter(key)(model) for key in shown}
    if unlike := [f"model.{key} is {there}, not {here[key]}" for key, there in shown.items() if there != here[key]]:
        raise WrongWeights(
            f"{file} holds another network than the config describes ({', '.join(unlike)}): set these keys so, or "
            f"take the config of these weights{_INIT_NEW}",
            missing,
            left_over,
        )
    if missing or left_over:
        raise WrongWeights(
            f"{file} is not this network: {len(missing)} tensors are missing ({_some(missing)}) and "
            f"{len(left_over)} are left over ({_some(left_over)}): choose the config of these weights; "
            f"`fitv2 checkpoint import … --json` lists them all{_INIT_NEW}",
            missing,
            left_over,
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{file}: {name} is {tensors[name].shape}, the config wants {shape}: choose another config{_INIT_NEW}"
            )
        if tensors[name].dtype != "torch.float32":
            raise UserError(f"{file}: {name} is {tensors[name].dtype}, but only float32 weights are imported")


def _some(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
