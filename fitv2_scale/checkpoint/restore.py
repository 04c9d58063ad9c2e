"""Restores an engine from the newest intact commit.

Walks the run's log backwards. A damaged commit is reported and quarantined with the reason, and never deleted.
"""

from dataclasses import dataclass

import torch

from data_sharding.errors import UserError
from data_sharding.plan.plan import Cursor
from fitv2_scale.checkpoint.checksums import Damaged
from fitv2_scale.checkpoint.commit import MOMENTS, open_commit, read_tensors, verify_together
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.world import World
from fitv2_scale.run.log import LogEntry
from fitv2_scale.run.quarantine import quarantine
from fitv2_scale.run.run import Run


@dataclass(frozen=True)
class Restored:
    step: int
    cursor: Cursor | None  # None after an import of public weights
    accounting: dict[str, float]  # as given to ``Checkpointer.start_save``; empty if nothing was
    quarantined: list[str]  # a sentence for each newer commit that was skipped
    digest: str  # of the commit's manifest, which holds all others


def restore(engine: Engine, run: Run, world: World, step: int | None = None) -> Restored | None:
    """Fills ``engine``, on all ranks together, from the newest intact commit of ``run`` (or the one at ``step``).

    Returns None if the run has no commit (at ``step``). Raises UserError if all of these are damaged, or if they
    are another network's.
    """
    commits = world.run_on_rank0(run.log.commits)
    entries = [e for e in reversed(commits) if step is None or e.fields["step"] == step]
    skipped: list[str] = []
    for entry in entries:
        manifest, problem = world.run_on_rank0(lambda e=entry: open_commit(run, e))
        problem = problem or _fill(engine, run, entry, manifest, world)
        if problem is None:
            cursor = Cursor(**manifest["cursor"]) if manifest["cursor"] else None
            return Restored(manifest["step"], cursor, manifest.get("accounting", {}), skipped, entry.fields["manifest"])
        skipped.append(
            f"the commit at step {entry.fields['step']} is damaged ({problem})"
            + (" and was skipped" if step is None else "")
        )
        world.run_on_rank0(lambda e=entry, p=problem: quarantine(run, e, p))
    if entries:
        damage = "; ".join(skipped)
        raise UserError(f"{run.url}: {damage}" if step is not None else f"{run.url}: all commits are damaged: {damage}")
    return None


def has_committed(run: Run, step: int, world: World) -> bool:
    """Whether the newest intact commit of ``run`` is at ``step`` or later: whoever asks will not restore it, so all of
    it is read here. A collective; damaged commits are quarantined as in ``restore``."""
    for entry in reversed(world.run_on_rank0(run.log.commits)):
        if entry.fields["step"] < step:
            break
        problem = "; ".join(verify_together(run, entry, world))
        if not problem:
            return True
        world.run_on_rank0(lambda e=entry, p=problem: quarantine(run, e, p))
    return False


def _fill(engine: Engine, run: Run, entry: LogEntry, manifest: dict, world: World) -> str | None:
    """Reads the commit into ``engine``; returns what is wrong with it, the same on all ranks."""
    tensors, stored = engine.boxes(), manifest["tensors"].keys()
    if not manifest["moments"]:  # imported weights: the optimizer starts from zero
        tensors = {name: logical for name, logical in tensors.items() if not name.startswith(MOMENTS)}
    missing = [name for name in tensors if name not in stored]
    if missing:
        raise UserError(f"{run.url}: the commit at step {manifest['step']} holds no {missing[0]}: not this network's")
    try:
        read_tensors(run, entry, manifest, tensors, world)
    except Damaged as error:
        return str(error)
    if manifest["moments"]:
        engine.load_scalars(manifest["scalars"])
    else:
        _reset_optimizer(engine)
    engine.loaded()
    return None


@torch.no_grad()
def _reset_optimizer(engine: Engine) -> None:
    """As before the first step: a damaged commit, of which some ranks have read their parts, may have left its own."""
    for name, logical in engine.boxes().items():
        if name.startswith(MOMENTS):
            for box in logical.boxes:
                box.tensor.zero_()
    engine.load_scalars(dict.fromkeys(engine.scalars(), 0.0))
