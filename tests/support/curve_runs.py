"""Runs whose journals follow a known law: what curves are tested on."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fitv2_scale.config.load import parse_config
from fitv2_scale.model.counts import parameter_count
from fitv2_scale.planning.scaling.fits import SurfaceFit
from fitv2_scale.run.run import Run

TRUTH = SurfaceFit(E=0.45, A=0.12 * 128e6**0.28, alpha=0.28, B=0.08 * 1e8**0.3, beta=0.3)
SIZES = {"s2": (15, 384, 6), "b2": (15, 768, 12), "l2": (28, 1024, 16), "xl2": (36, 1152, 16), "3b2": (40, 2304, 24)}
BATCH, WARMUP, TOKENS = 256, 5000, 246


def config(size: str) -> dict:
    depth, hidden, heads = SIZES[size]
    tree = {
        "model": {"depth": depth, "hidden": hidden, "heads": heads, "classes": 1000},
        "data": {"url": "none"},
        "batch": {"images": BATCH},
        "optimizer": {"warmup_steps": WARMUP},
        "train": {"steps": 2_000_000},
    }
    return parse_config(tree, size).model_dump(mode="json")


def parameters(size: str) -> int:
    return parameter_count(parse_config(config(size), size).model)


def make_run(
    folder: Path, size: str, steps: Sequence[int], noise: float = 0.0, seed: int = 0, offset: float = 0.0,
    fid: Sequence[float] = (), changes: dict | None = None, facts: dict | None = None, parent: dict | None = None,
    **more,
) -> Run:  # fmt: skip
    """A run of one attempt that has committed all of ``steps``; ``more`` are metrics by name, one value a step, as
    ``fid`` is of the last ones. ``changes`` are to its config, by section; ``facts`` are in its start.json."""
    plain = config(size)
    for section, keys in (changes or {}).items():
        plain[section] = plain[section] | keys if isinstance(keys, dict) else keys
    run = Run.open_or_create(str(folder), plain, {}, "plan", parent)
    rng = np.random.default_rng(seed)
    steps = np.asarray(steps)
    loss = TRUTH(parameters(size), steps * BATCH) * np.exp(noise * rng.standard_normal(len(steps)) + offset)
    columns = {"loss": loss, "images_per_second": np.full(len(steps), 1000.0)} | more
    columns["tokens_per_second"] = columns["images_per_second"] * TOKENS
    continue_run(run, steps, facts or {}, **columns)
    for step, value in zip(steps[len(steps) - len(fid) :].tolist(), fid, strict=True):
        cell = {"label": "256x256_cfg1", "step": step, "fid": float(value)}
        run.store.put(
            f"evaluations/{step}.json", json.dumps({"step": step, "fid": float(value), "cells": [cell]}).encode()
        )
    return run


def continue_run(run: Run, steps: Sequence[int], facts: dict, **columns: Sequence[float]) -> None:
    """One more attempt, of ``facts``, that has measured ``columns`` at ``steps`` and committed them."""
    attempt, steps = run.claim(facts), np.asarray(steps)
    journal = attempt.folder / "journal"
    journal.mkdir(parents=True)
    with open(journal / "00000.jsonl", "w") as file:
        file.write(json.dumps({"attempt": attempt.number, "start_step": 0}) + "\n")
        for i, step in enumerate(steps.tolist()):
            metrics = {name: float(values[i]) for name, values in columns.items()}
            file.write(json.dumps({"step": step, "time_ms": 1000 * step, "metrics": metrics}) + "\n")
    attempt.commit(int(steps[-1]), f"steps/{steps[-1]}", "sha256:00")
