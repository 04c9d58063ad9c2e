"""Initial weights for a new run (``init_from``): the EMA of another run's commit, or a file of public weights.

They become the weights and the EMA; optimizer, step and data start from zero. All tensors are loaded, including those
that a high-resolution stage trains: the released loader drops these, and with them what they had learned.
"""

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


def load_initial_weights(source: WeightsSource, engine: Engine, model: ModelConfig, world: World) -> None:
    """Fills weights and EMA of ``engine``, on all ranks together.

    Raises:
        UserError: there are no such weights, they are damaged, or of another network than ``model``; or the ranks do
            not read the same.
    """
    if source.step is None:
        read_alike(world, lambda: _from_file(source.url, engine, model))
    else:
        _from_run(source, engine, world)
    engine.loaded()


@torch.no_grad()
def _from_file(file: str, engine: Engine, model: ModelConfig) -> tuple[None, Facts]:
    """Also returns the digest of all that it has read: each rank reads the file for itself, perhaps a copy of it."""
    wanted, digest = engine.boxes(), xxhash.xxh3_128()
    for name, whole in read_finite(file, dict(sorted(open_weights(file, model).items()))):
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(whole.contiguous().flatten().view(torch.uint8).numpy().data)
        for box in (*wanted[f"param/{name}"].boxes, *wanted[f"ema/{name}"].boxes):
            part = whole
            for dim, (start, length) in enumerate(zip(box.offset, box.tensor.shape, strict=True)):
                part = part.narrow(dim, start, length)
            box.tensor.copy_(part)
    return None, {f"content of {file}": digest.hexdigest()}


def _from_run(source: WeightsSource, engine: Engine, world: World) -> None:
    try:
        run, entry, manifest = read_alike(world, lambda: _open_commit(source, engine))
        for kind in ("param/", "ema/"):
            tensors = {
                f"ema/{name.removeprefix(kind)}": logical
                for name, logical in engine.boxes().items()
                if name.startswith(kind)
            }
            read_tensors(run, entry, manifest, tensors, world)
    except Damaged as error:
        raise UserError(
            f"{source.url}: the commit at step {source.step} is damaged ({error}): choose another"
        ) from error


def _open_commit(source: WeightsSource, engine: Engine) -> tuple[tuple[Run, LogEntry, dict], Facts]:
    """Also returns its digest: each rank opens the run for itself. Raises Damaged, UserError."""
    run, entry = Run.open(source.url), source.commit()
    manifest = read_manifest(run, entry)
    _check(source, engine, manifest["tensors"])
    return (run, entry, manifest), {f"commit of {source.url}": entry.fields["manifest"]}


def _check(source: WeightsSource, engine: Engine, stored: dict[str, dict]) -> None:
    wanted = {name: logical.shape for name, logical in engine.boxes().items() if name.startswith("ema/")}
    found = {name: tuple(tensor["shape"]) for name, tensor in stored.items() if name.startswith("ema/")}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{source.url} holds another network: {name.removeprefix('ema/')} is {found.get(name, 'missing')} "
                f"there and {wanted.get(name, 'missing')} in this config: make the section model the same"
            )
