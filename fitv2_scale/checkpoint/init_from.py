"""Initial weights for a new run (``init_from``): the EMA of another run's commit, or a file of public weights.

They become the weights and the EMA; optimizer, step and data start from zero. All tensors are loaded, including those
that a high-resolution stage trains: the released loader drops these, and with them what they had learned. Only those
that ``init_new`` names keep the values that the engine has drawn, say the table of other classes.
"""

from collections.abc import Collection

import torch
import xxhash

from data_sharding.errors import UserError
from fitv2_scale.checkpoint.checksums import Damaged
from fitv2_scale.checkpoint.commit import read_manifest, read_tensors
from fitv2_scale.checkpoint.weights import open_weights, read_finite
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.parallel.agreement import Facts, read_alike
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.world import World
from fitv2_scale.run.log import LogEntry
from fitv2_scale.run.run import Run
from fitv2_scale.run.weights_source import WeightsSource


def load_initial_weights(
    source: WeightsSource, engine: Engine, model: ModelConfig, world: World, new: Collection[str] = ()
) -> str:
    """Fills weights and EMA of ``engine``, but for the tensors ``new``, on all ranks together. Returns a note of what
    they are.

    Raises:
        UserError: there are no such weights, they are damaged, or of another network than ``model``; or the ranks do
            not read the same.
    """
    if source.step is None:
        origin = read_alike(world, lambda: _from_file(source.url, engine, model, new))
    else:
        origin = f"@{source.step}"
        _from_run(source, engine, world, new)
    engine.loaded()
    return f"starts with the weights of {source.url}{origin}" + (f"; new tensors: {', '.join(new)}" if new else "")


@torch.no_grad()
def _from_file(file: str, engine: Engine, model: ModelConfig, new: Collection[str]) -> tuple[str, Facts]:
    """What of the file was read, and the digest of it: each rank reads the file for itself, perhaps a copy of it."""
    wanted, digest = engine.boxes(), xxhash.xxh3_128()
    weights = open_weights(file, model, new)
    for name, whole in read_finite(file, dict(sorted(weights.tensors.items()))):
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(whole.contiguous().flatten().view(torch.uint8).numpy().data)
        for box in (*wanted[f"param/{name}"].boxes, *wanted[f"ema/{name}"].boxes):
            part = whole
            for dim, (start, length) in enumerate(zip(box.offset, box.tensor.shape, strict=True)):
                part = part.narrow(dim, start, length)
            box.tensor.copy_(part)
    return weights.origin, {f"content of {file}": digest.hexdigest()}


def _from_run(source: WeightsSource, engine: Engine, world: World, new: Collection[str]) -> None:
    try:
        run, entry, manifest = read_alike(world, lambda: _open_commit(source, engine, new))
        for kind in ("param/", "ema/"):
            tensors = {
                f"ema/{name.removeprefix(kind)}": logical
                for name, logical in engine.boxes().items()
                if name.startswith(kind) and name.removeprefix(kind) not in new
            }
            read_tensors(run, entry, manifest, tensors, world)
    except Damaged as error:
        raise UserError(
            f"{source.url}: the commit at step {source.step} is damaged ({error}): choose another"
        ) from error


def _open_commit(
    source: WeightsSource, engine: Engine, new: Collection[str]
) -> tuple[tuple[Run, LogEntry, dict], Facts]:
    """Also returns its digest: each rank opens the run for itself. Raises Damaged, UserError."""
    run, entry = Run.open(source.url), source.commit()
    manifest = read_manifest(run, entry)
    _check(source, engine, manifest["tensors"], new)
    return (run, entry, manifest), {f"commit of {source.url}": entry.fields["manifest"]}


def _check(source: WeightsSource, engine: Engine, stored: dict[str, dict], new: Collection[str]) -> None:
    wanted = {name: logical.shape for name, logical in engine.boxes().items() if name.startswith("ema/")}
    found = {name: tuple(tensor["shape"]) for name, tensor in stored.items() if name.startswith("ema/")}
    for key in sorted(wanted.keys() | found.keys()):
        if (name := key.removeprefix("ema/")) not in new and wanted.get(key) != found.get(key):
            raise UserError(
                f"{source.url} holds another network: {name} is {found.get(key, 'missing')} there and "
                f"{wanted.get(key, 'missing')} in this config: make the section model the same, or let init_new name "
                "the tensors that are drawn instead of loaded"
            )
