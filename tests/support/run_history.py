"""What a run really did, and how far it is, read from its folder."""

import json
from collections import defaultdict
from pathlib import Path

from fitv2_scale.run.run import Run
from fitv2_scale.tracking.journal import read, spans
from tests.support.waiting import wait

AUDITED = ("epoch", "id", "t", "label", "x", "target")


def losses(run: str) -> dict[int, float]:
    """Loss by step (counted from 1) along the canonical curve; needs train.log_every = 1."""
    return {r.step: r.metrics["loss"] for r in read(Run.open(run)) if "loss" in (r.metrics or {})}


def trained(run: str, since: int = 0) -> dict[int, list[tuple]]:
    """Sorted (epoch, id, bits of t, label, digests of x and target) of each step (counted from 0), from the audits of
    all ranks."""
    steps = defaultdict(list)
    for span in spans(Run.open(run).log.entries()):
        for file in sorted(Path(run, f"attempts/{span.attempt}/audit").glob("rank-*.jsonl")):
            for line in map(json.loads, file.read_text().splitlines()):
                if line["step"] >= since and span.low < line["step"] + 1 <= span.high:
                    steps[line["step"]] += zip(*(line[column] for column in AUDITED), strict=True)
    return {step: sorted(images) for step, images in sorted(steps.items())}


def audited(run: str, attempt: int) -> list[int]:
    """Steps (counted from 0) that rank 0 of the attempt has taken so far; needs train.audit."""
    file = Path(run, f"attempts/{attempt}/audit/rank-00000.jsonl")
    if not file.exists():
        return []
    return [json.loads(line)["step"] for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def last_step(run: str, attempt: int) -> int:
    """The newest of them; -1 before the first."""
    return (audited(run, attempt) or [-1])[-1]


def reach(run: str, step: int, attempt: int) -> None:
    """Waits until the attempt has begun the step after ``step``."""
    wait(f"step {step} of attempt {attempt}", lambda: last_step(run, attempt) >= step)


def metrics(run: str) -> dict[int, dict[str, float]]:
    """All metrics of each step along the canonical curve."""
    found: dict[int, dict[str, float]] = {}
    for record in read(Run.open(run)):
        found.setdefault(record.step, {}).update(record.metrics or {})
    return found
