"""Saving, restoring and retiring commits of a run.

A save writes data, then a manifest with the digest of each file, then COMMIT in the run's log: until that entry stands
there is no checkpoint, and nothing is renamed. A restore walks the log backwards to the newest commit that is whole;
what is not is named, quarantined with the reason, and never deleted.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
import torch.distributed.checkpoint as dcp

from data_sharding.errors import UserError
from data_sharding.plan import Cursor
from fitv2_scale.checkpoint.boxed import BoxedTensor
from fitv2_scale.checkpoint.safetensors_file import file_digest
from fitv2_scale.checkpoint.storage import FORMAT, MANIFEST, BoxReader, BoxWriter
from fitv2_scale.parallel.boxes import LogicalTensor
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.world import World
from fitv2_scale.run import Attempt, Run
from fitv2_scale.run_log import Entry

MOMENTS = ("exp_avg/", "exp_avg_sq/")


@dataclass(frozen=True)
class Restored:
    step: int
    cursor: Cursor | None  # None after an import of public weights
    quarantined: list[str]  # a sentence for each newer commit that was passed over


class Checkpointer:
    """Saves and restores on all ranks together. ``attempt`` is rank 0's own; the others only write their data."""

    def __init__(self, run: Run, attempt: Attempt | None, number: int, world: World, keep_last: int):
        self._run, self._attempt, self._number, self._world = run, attempt, number, world
        self._keep_last = keep_last

    def save(self, engine: Engine, step: int, cursor: Cursor) -> None:
        """Commits the state after ``step`` steps. Raises StaleAttempt on all ranks if a newer attempt took over."""
        folder = commit_folder(step, self._number)
        header = {"step": step, "attempt": self._number, "cursor": asdict(cursor), "scalars": engine.scalars()}
        writer = write_commit(self._run, folder, self._world.rank, header, engine.boxes(), self._world.cpu_group)
        self._world.on_first(lambda: self._commit(step, folder, writer.manifest_digest))

    def _commit(self, step: int, folder: str, digest: str) -> None:
        self._attempt.commit(step, folder, digest)
        for entry in to_retire(self._run.log.commits(), self._quarantined(), self._keep_last):
            self._attempt.retire(entry.n)
            self._run.store.delete_tree(entry.fields["path"])

    def _quarantined(self) -> set[int]:
        return {int(Path(path).stem) for path in self._run.store.list("quarantine/")}

    def restore(self, engine: Engine, run: Run, step: int | None = None) -> Restored | None:
        """Fills ``engine`` from the newest whole commit of ``run`` (or the one at ``step``); None if there is none."""
        found = self._world.on_first(lambda: [asdict(e) for e in reversed(run.log.commits())])
        entries = [Entry(**e) for e in found if step is None or e["fields"]["step"] == step]
        quarantined: list[str] = []
        for entry in entries:
            problem, manifest = self._verify(run, entry)
            if problem is None:
                _fill(engine, run, entry.fields["path"], manifest, self._world.cpu_group)
                cursor = Cursor(**manifest["cursor"]) if manifest["cursor"] else None
                return Restored(manifest["step"], cursor, quarantined)
            quarantined.append(f"commit at step {entry.fields['step']} is not whole ({problem}); it was passed over")
            self._world.on_first(lambda e=entry, p=problem: self._quarantine(e, p))
        if entries:
            raise UserError(f"{run.url}: no commit is whole: " + "; ".join(quarantined))
        return None

    def _verify(self, run: Run, entry: Entry) -> tuple[str | None, dict]:
        """The first problem any rank finds; each rank reads its share of the files."""
        try:
            manifest = read_manifest(run, entry)
            problem = next(_problems(run, entry, manifest, self._world.rank, self._world.size), None)
        except UserError as error:
            manifest, problem = {}, str(error)
        return next(filter(None, self._world.gather(problem)), None), manifest

    def _quarantine(self, entry: Entry, problem: str) -> None:
        record = {"entry": entry.n, "path": entry.fields["path"], "problem": problem}
        self._run.store.put(f"quarantine/{entry.n:08d}.json", json.dumps(record).encode())


def to_retire(commits: list[Entry], quarantined: set[int], keep_last: int) -> list[Entry]:
    """The commits that are no longer needed: all but the newest ``keep_last`` that are not known to be damaged.

    A damaged one neither counts as kept nor is ever deleted.
    """
    return [entry for entry in commits if entry.n not in quarantined][:-keep_last]


def commit_folder(step: int, attempt: int) -> str:
    """Where an attempt saves a step: never where another did, so a late delete by an old attempt hits only its own."""
    return f"steps/{step:08d}.{attempt:04d}"


def write_commit(
    run: Run, folder: str, rank: int, header: dict, tensors: dict[str, LogicalTensor], group: Any
) -> BoxWriter:
    """Writes data and manifest of a commit, all ranks of ``group`` together (None: this process alone)."""
    moments = sorted({name.split("/", 1)[1] for name in tensors if name.startswith(MOMENTS)})
    writer = BoxWriter(run.store, folder, rank, header | {"moments": moments})
    state = {name: BoxedTensor(logical) for name, logical in tensors.items()}
    dcp.save(state, storage_writer=writer, process_group=group, no_dist=group is None)
    return writer


def read_manifest(run: Run, entry: Entry) -> dict:
    """The manifest of a commit, checked against the log. Raises UserError."""
    path = f"{entry.fields['path']}/{MANIFEST}"
    try:
        text = run.store.read(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    if hashlib.sha256(text).hexdigest() != entry.fields["manifest"]:
        raise UserError(f"{path} does not match its digest in the log")
    manifest = json.loads(text)
    if manifest["format"] != FORMAT:
        raise UserError(f"{path} is of format {manifest['format']}, this program reads format {FORMAT}")
    return manifest


def verify_commit(run: Run, entry: Entry) -> list[str]:
    """Everything wrong with a commit, a sentence each."""
    try:
        return list(_problems(run, entry, read_manifest(run, entry), 0, 1))
    except UserError as error:
        return [str(error)]


def _problems(run: Run, entry: Entry, manifest: dict, rank: int, ranks: int) -> Iterator[str]:
    for file, recorded in list(sorted(manifest["files"].items()))[rank::ranks]:
        fs, path = fsspec.core.url_to_fs(run.store.path(f"{entry.fields['path']}/{file}"))
        try:
            size, digest = file_digest(fs, path)
        except FileNotFoundError:
            yield f"{file} is missing"
            continue
        if size != recorded["bytes"]:
            yield f"{file} has {size} bytes, not {recorded['bytes']}"
        elif digest != recorded["xxh3_128"]:
            yield f"{file} does not match its digest"


def _fill(engine: Engine, run: Run, folder: str, manifest: dict, group: Any) -> None:
    wanted, stored = engine.boxes(), manifest["tensors"].keys()
    if not manifest["moments"]:  # imported weights: the optimizer begins anew
        wanted = {name: logical for name, logical in wanted.items() if not name.startswith(MOMENTS)}
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise UserError(f"{run.url}: the commit at step {manifest['step']} holds no {missing[0]}: not this network's")
    state = {name: BoxedTensor(logical) for name, logical in wanted.items()}
    dcp.load(state, storage_reader=BoxReader(run.store, folder, manifest), process_group=group)
    if manifest["moments"]:
        engine.load_scalars(manifest["scalars"])
