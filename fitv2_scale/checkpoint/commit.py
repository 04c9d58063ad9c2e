"""A commit of a run on storage: writing, reading and checking it.

Its files are ``steps/<step>.<attempt>/rank-00000.safetensors`` …, one of each rank that has something to write, and
``manifest.json`` beside them (``commit_folder`` names the folder, ``commit_files`` describes the files). It counts once
a COMMIT entry in the run's log names that folder and the sha256 of the manifest.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import PurePosixPath
from traceback import StackSummary, extract_tb

from torch.distributed.checkpoint.api import CheckpointException

from data_sharding.errors import DataError, UserError
from data_sharding.storage.json_bytes import from_json
from fitv2_scale.checkpoint.bad_commit import finding_bad_places
from fitv2_scale.checkpoint.checksums import CHUNK, ChunkReader, Damaged
from fitv2_scale.checkpoint.commit_files import FORMAT, MANIFEST, CommitReader, CommitWriter
from fitv2_scale.checkpoint.manifest_shape import manifest_of
from fitv2_scale.checkpoint.save_plan import SavePlan
from fitv2_scale.parallel.boxes import LogicalTensor
from fitv2_scale.parallel.failures import portable
from fitv2_scale.parallel.world import World
from fitv2_scale.run.log import LogEntry
from fitv2_scale.run.run import Run

MOMENTS = ("exp_avg/", "exp_avg_sq/")


def commit_folder(step: int, attempt: int, failures: int = 0) -> str:
    """Where an attempt saves ``step`` after ``failures`` of its saves have failed: a folder that no other save uses, so
    that a late delete by an old attempt deletes only its own data."""
    return f"steps/{step:08d}.{attempt:04d}" + (f".{failures}" if failures else "")


def attempt_of(folder: str) -> int | None:
    """The attempt that saved into ``folder``; None if ``commit_folder`` gives no such name."""
    parts = PurePosixPath(folder).name.split(".")
    return int(parts[1]) if len(parts) in (2, 3) and all(part.isdecimal() for part in parts) else None


def write_commit(run: Run, folder: str, header: dict, plan: SavePlan, ranks: World) -> str:
    """Writes data and manifest of a commit, all ``ranks`` together. Returns on rank 0 the sha256 of the manifest, for
    the COMMIT entry; elsewhere "". Raises CheckpointException on all ranks if one of them fails (see ``cause_of``)."""
    moments = sorted({name.split("/", 1)[1] for name in plan.names if name.startswith(MOMENTS)})
    writer, digest, mine = CommitWriter(run.store, folder, ranks.rank, plan), "", None
    try:
        mine = writer.write_data()
    except Exception as error:
        mine = _Failed.of(error)
    told = ranks.gather(mine)
    failed = {rank: one for rank, one in enumerate(told) if isinstance(one, _Failed)}
    if ranks.is_first and not failed:
        try:
            digest = writer.finish(header | {"moments": moments}, told)
        except Exception as error:
            failed = {ranks.rank: _Failed.of(error)}
    if failed := ranks.broadcast(failed):
        raise CheckpointException("write", {rank: (one.error, one.stack) for rank, one in failed.items()})
    return digest


@dataclass(frozen=True)
class _Failed:
    """What a rank met, as it can be sent."""

    error: Exception
    stack: StackSummary

    @classmethod
    def of(cls, error: Exception) -> "_Failed":
        return cls(portable(error) or error, extract_tb(error.__traceback__))


def read_tensors(run: Run, entry: LogEntry, manifest: dict, tensors: dict[str, LogicalTensor], world: World) -> None:
    """Fills ``tensors`` from the commit's tensors of the same names, on all ranks of ``world`` together. Each plans for
    itself what it reads.

    Raises, on all ranks, the gravest of what they met: Damaged if nothing worse.
    """
    reader = CommitReader(run.store, entry.fields["path"], manifest, lambda act: finding_bad_places(run, entry, act))
    failure = None
    try:
        reader.read(tensors)
    except Exception as error:
        failure = error
    if errors := [error for error in world.all_gather(portable(failure)) if error is not None]:
        raise min(errors, key=_harmless) from failure


def cause_of(error: CheckpointException) -> BaseException:
    """The gravest of what the ranks met."""
    return min((cause for cause, _ in error.failures.values()), key=_harmless)


def _harmless(cause: BaseException) -> int:
    """A bug before trouble with the storage, and that before damage."""
    return 2 if isinstance(cause, Damaged) else 1 if isinstance(cause, OSError | UserError) else 0


def read_manifest(run: Run, entry: LogEntry) -> dict:
    """The manifest of a commit, checked against the log. Raises Damaged; UserError if it is of another format."""
    path = f"{entry.fields['path']}/{MANIFEST}"
    try:
        text = finding_bad_places(run, entry, lambda: run.store.read(path))
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    if hashlib.sha256(text).hexdigest() != entry.fields["manifest"]:
        raise Damaged(f"{path} does not match its digest in the log")
    try:
        written = from_json(text, path)
        if isinstance(written, dict) and written.get("format", FORMAT) != FORMAT:
            raise UserError(f"{path} is of format {written['format']}, this program reads format {FORMAT}")
        return manifest_of(written)
    except (ValueError, DataError) as error:
        raise Damaged(f"{path} is no manifest of a commit: {error}") from error


def verify_commit(run: Run, entry: LogEntry, reader: int = 0, readers: int = 1) -> list[str]:
    """All problems of a commit, a sentence each. Reads all of it; of several ``readers``, each one a part."""
    try:
        manifest = read_manifest(run, entry)
    except Damaged as error:
        return [str(error)]
    chunks, problems = ChunkReader(run.store, entry.fields["path"], manifest["files"]), []
    parts = [(file, n) for file, f in sorted(manifest["files"].items()) for n in range(-(-f["bytes"] // CHUNK))]

    def check(file: str, indices: list[int]) -> None:
        chunks.check_size(file)
        for index in indices:
            chunks.chunk(file, index)

    for file, own in groupby(parts[reader::readers], key=lambda part: part[0]):
        try:
            finding_bad_places(run, entry, partial(check, file, [index for _, index in own]))
        except Damaged as error:
            problems.append(str(error))
    return problems


def verify_together(run: Run, entry: LogEntry, world: World) -> list[str]:
    """As ``verify_commit``, on all ranks of ``world`` together: the same problems, or what any of them met."""
    mine, failure = list[str](), None
    try:
        mine = verify_commit(run, entry, world.rank, world.size)
    except Exception as error:
        failure = error
    world.raise_shared(failure)
    return sorted({problem for problems in world.all_gather(mine) for problem in problems})


def open_commit(run: Run, entry: LogEntry) -> tuple[dict, str | None]:
    """(manifest, None), or ({}, what is wrong with the commit)."""
    try:
        return read_manifest(run, entry), None
    except Damaged as error:
        return {}, str(error)


def quick_check(run: Run, entry: LogEntry) -> str | None:
    """What is wrong with a commit as far as its manifest and the sizes of its files show; None if nothing is."""
    try:
        manifest = read_manifest(run, entry)
        reader = ChunkReader(run.store, entry.fields["path"], manifest["files"])
        for file in manifest["files"]:
            finding_bad_places(run, entry, partial(reader.check_size, file))
    except Damaged as error:
        return str(error)
    return None
