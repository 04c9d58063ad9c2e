"""What the commits of a run hold: bytes, to be compared with those of another run, and whole tensors."""

import json
from pathlib import Path

import torch

from fitv2_scale.checkpoint.commit import read_manifest
from fitv2_scale.checkpoint.commit_files import CommitReader
from fitv2_scale.run.run import Run


def newest_commit(run: str) -> Path:
    """Its folder."""
    return Path(run, Run.open(run).log.commits()[-1].fields["path"])


def commit_bytes(run: str) -> dict[str, bytes]:
    """Every data file of the newest commit, and its scalars: equal if weights, EMA and optimizer are, bit for bit."""
    return _bytes_of(newest_commit(run))


def all_commits(run: str) -> dict[int, dict[str, bytes]]:
    """The same of every commit, by step."""
    return {e.fields["step"]: _bytes_of(Path(run, e.fields["path"])) for e in Run.open(run).log.commits()}


def _bytes_of(commit: Path) -> dict[str, bytes]:
    files = {f.name: f.read_bytes() for f in commit.glob("*.safetensors")}
    return files | {"scalars": json.dumps(json.loads((commit / "manifest.json").read_text())["scalars"]).encode()}


def read_tensors(url: str, kind: str = "", step: int | None = None) -> dict[str, torch.Tensor]:
    """Whole tensors of the commit at ``step``, else of the newest: all of them, or those of a kind such as ``ema/``, by
    the names behind it."""
    run = Run.open(url)
    entry = [e for e in run.log.commits() if step in (None, e.fields["step"])][-1]
    manifest = read_manifest(run, entry)
    reader = CommitReader(run.store, entry.fields["path"], manifest)
    names = [name for name in manifest["tensors"] if name.startswith(kind)]
    return {name.removeprefix(kind): reader.read_tensor(name) for name in names}
