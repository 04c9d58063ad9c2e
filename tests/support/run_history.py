"""What a run really did, read from its folder: losses and trained images of the attempts that its commits vouch for."""

import json
from collections import defaultdict
from pathlib import Path

from fitv2_scale.run.run import Run
from fitv2_scale.tracking.journal import read, spans


def losses(run: str) -> dict[int, float]:
    """Loss by step (counted from 1) along the canonical curve; needs train.log_every = 1."""
    return {r.step: r.metrics["loss"] for r in read(Run.open(run)) if "loss" in (r.metrics or {})}


def trained(run: str) -> dict[int, list[tuple]]:
    """Sorted (epoch, id, bits of t, digest of noise) of each step (counted from 0), from the audits of all ranks."""
    steps = defaultdict(list)
    for span in spans(Run.open(run).log.entries()):
        for file in sorted(Path(run, f"attempts/{span.attempt}/audit").glob("rank-*.jsonl")):
            for line in map(json.loads, file.read_text().splitlines()):
                if span.low < line["step"] + 1 <= span.high:
                    steps[line["step"]] += zip(line["epoch"], line["id"], line["t"], line["noise"], strict=True)
    return {step: sorted(images) for step, images in sorted(steps.items())}


def commit_bytes(run: str) -> dict[str, bytes]:
    """Every data file of the newest commit, and its scalars: equal if weights, EMA and optimizer are, bit for bit."""
    folder = Path(run, Run.open(run).log.commits()[-1].fields["path"])
    files = {f.name: f.read_bytes() for f in folder.glob("*.safetensors")}
    return files | {"scalars": json.dumps(json.loads((folder / "manifest.json").read_text())["scalars"]).encode()}
