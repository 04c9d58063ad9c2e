"""Everything that reads a run's folder survives what a stranger could have written there."""

import hashlib
import json
import shutil
from pathlib import Path
from random import Random

import pytest

from fitv2_scale.checkpoint.checksums import Damaged
from fitv2_scale.checkpoint.commit import quick_check, read_manifest, verify_commit
from fitv2_scale.checkpoint.commit_files import CommitReader
from fitv2_scale.run.run import Attempt, Run
from fitv2_scale.run.status import status
from fitv2_scale.tracking.journal import Position, read, read_attempt
from launchers.chain_log import signal_seconds
from launchers.control import chain, jobs
from tests.support.fuzzing import COUNTS, Input, as_json, edited_bytes, edited_trees, fuzz, one_of
from tests.support.repository import ROOT

OLD = ROOT / "tests/fixtures/made_by_a2e80d5/run"


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(OLD, tmp_path / "run")
    return tmp_path / "run"


def trees_of(folder: Path, *files: str) -> Input:
    """(file, edited bytes): of JSON, or of any."""
    good = {name: (folder / name).read_bytes() for name in files}
    edits = {
        name: one_of(as_json(edited_trees([json.loads(data)])), edited_bytes([data])) for name, data in good.items()
    }

    def draw(rng: Random) -> tuple[str, bytes]:
        name = rng.choice(files)
        return name, edits[name](rng)

    return draw


def survives(folder: Path, files: tuple[str, ...], look, count: int, allowed: tuple = ()) -> None:
    """``look()`` with one of the run's ``files`` edited."""
    good = {name: (folder / name).read_bytes() for name in files}

    def with_edit(edit: tuple[str, bytes]) -> None:
        name, data = edit
        (folder / name).write_bytes(data)
        try:
            look()
        finally:
            (folder / name).write_bytes(good[name])

    fuzz(trees_of(folder, *files), with_edit, count, allowed, size=lambda edit: len(edit[1]))


@COUNTS
def test_identity_of_a_run(folder, count):
    recipe = Run.open(str(folder)).recipe
    plan = Run.open(str(folder)).plan_hash

    def look() -> None:
        status(Run.open(str(folder)))
        Run.open_or_create(str(folder), {}, recipe, plan)

    survives(folder, ("run.json",), look, count)


@COUNTS
def test_entries_of_the_log(folder, count):
    def look() -> None:
        run = Run.open(str(folder))
        status(run)
        list(read(run))
        signal_seconds(run, 0)

    survives(folder, tuple(f"log/{n:08d}" for n in (1, 2, 3, 4)), look, count)


@COUNTS
def test_files_of_an_attempt(folder, count):
    def look() -> None:
        run = Run.open(str(folder))
        status(run)
        signal_seconds(run, 0)
        assert Attempt(1, run).changed is not None

    survives(folder, ("attempts/1/start.json", "attempts/1/end.json", "attempts/1/pace.json"), look, count)


@COUNTS
def test_lines_of_a_journal(folder, count):
    name = "attempts/1/journal/00000.jsonl"
    lines = (folder / name).read_bytes().splitlines(keepends=True)
    run = Run.open(str(folder))

    def look(data: bytes) -> None:
        (folder / name).write_bytes(data)
        list(read_attempt(run, Position(1)))
        list(read(run))

    line = as_json(edited_trees([json.loads(line) for line in lines[:3]]))
    fuzz(one_of(lambda rng: line(rng) + b"\n" + lines[0], edited_bytes([b"".join(lines[:4])])), look, count)


@COUNTS
def test_manifest_of_a_commit(folder, count):
    """...whose digest in the log is right."""
    entry = Run.open(str(folder)).log.commits()[0]
    name, log = f"{entry.fields['path']}/manifest.json", folder / f"log/{entry.n:08d}"
    record = json.loads(log.read_text())

    def look() -> None:
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        log.write_text(json.dumps(record | {"manifest": digest}))
        run = Run.open(str(folder))
        (commit,) = run.log.commits()
        quick_check(run, commit)
        verify_commit(run, commit)
        manifest = read_manifest(run, commit)
        reader = CommitReader(run.store, commit.fields["path"], manifest)
        for tensor in list(manifest["tensors"])[:5]:
            reader.read_tensor(tensor)

    survives(folder, (name,), look, count, allowed=(Damaged,))


CHAIN = [
    {
        "kind": "SUBMIT",
        "time": "2026-01-01T00:00:00+00:00",
        "nonce": "a",
        "home": "HOME",
        "log": 0,
        "nodes": "2",
        "git": "x",
    },
    {
        "kind": "START",
        "time": "2026-01-01T00:00:01+00:00",
        "nonce": "b",
        "job": "7",
        "restart": 0,
        "nodes": ["n1"],
        "commits": 0,
        "attempt": 0,
        "signal": 300,
    },
    {
        "kind": "END",
        "time": "2026-01-01T00:00:02+00:00",
        "nonce": "c",
        "job": "7",
        "restart": 0,
        "code": 75,
        "reason": "x",
        "blamed": [],
    },
]
SETTINGS = {
    "run": "RUN",
    "name": "n",
    "home": "HOME",
    "steps": 10,
    "least": 1,
    "most": 1,
    "tasks_per_node": 1,
    "partition": "",
    "fruitless": 3,
    "exclude_minutes": 1.0,
    "on_event": "",
    "tracked": False,
}


@COUNTS
def test_records_of_a_chain(folder, count):
    (folder / "chain").mkdir()
    for n, record in enumerate(CHAIN, 1):
        (folder / f"chain/{n:08d}").write_text(json.dumps(record).replace("HOME", str(folder / "jobs")))
    (folder / "jobs").mkdir()
    (folder / "jobs/chain.json").write_text(json.dumps(SETTINGS))

    def look() -> None:
        run = Run.open(str(folder))
        jobs(run)
        chain(run)

    look()
    survives(folder, (*(f"chain/{n:08d}" for n in (1, 2, 3)), "jobs/chain.json"), look, count)


@COUNTS
def test_records_of_substitutes(folder, count):
    frames = [{"dataset": "0" * 64, "frame": 1, "cause": "lost", "images": [[5, 0, 7, 0]]}]
    (folder / "ledger").mkdir()
    record = {"version": 1, "frames": frames, "step": 3, "nonce": "a", "time": "2026-01-01T00:00:00+00:00"}
    (folder / "ledger/00000001.json").write_text(json.dumps(record))
    survives(folder, ("ledger/00000001.json",), lambda: status(Run.open(str(folder))), count)
