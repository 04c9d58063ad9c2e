"""Bytes and inodes on disk of a run and of its dataset."""

from typing import Any

import numpy as np

from data_sharding.format.patches import stored_channels
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.config.sections import CheckpointConfig
from fitv2_scale.data import Data
from fitv2_scale.parallel.memory_estimate import state_bytes

_LATENT_BYTES = 2  # float16, the default of `fitv2 shard write`
_FLIPS = 2
_SHARD_IMAGES = 1000  # by default
_JOURNAL_ENTRY = 600  # bytes; tests/fitv2_scale/planning/forecast/test_plan_report.py holds it against a real one


def commit_bytes(config: Config) -> int:
    """Size of one commit: weights, EMA, and both moments of the trained tensors, in float32; the state of a run on a
    single rank."""
    return state_bytes("fsdp", config.model, Layout(1, 1), config.trainable, config.layout.precision, 0).held


def kept_steps(checkpoint: CheckpointConfig, steps: int) -> set[int]:
    """The steps of a run of so many whose commits are never deleted."""
    every = checkpoint.keep_every
    multiples = set(range(every, steps + 1, every)) if every else set()
    return multiples | {step for step in checkpoint.milestones if step <= steps}


def storage_report(config: Config, ranks: int, commits: int, data: Data | None) -> dict[str, Any]:
    """Bytes and inodes. The run makes ``commits`` commits, each written by ``ranks`` ranks. Upper bounds, since
    replicas may write less. One commit in flight and one about to be deleted are counted with those that are kept, if
    the run makes so many."""
    size, checkpoint = commit_bytes(config), config.checkpoint
    kept = checkpoint.keep_last + len(kept_steps(checkpoint, config.train.steps))
    held = min(kept + 2, commits)
    entries = config.train.steps // config.train.log_every
    report = {
        "commit_bytes": size,
        "commits_made": commits,
        "commits_kept": min(kept, commits),
        "run_bytes": held * size + entries * _JOURNAL_ENTRY,
        # A commit's files, its manifest and its folder; COMMIT and RETIRE in the log, a sealed segment of the journal.
        "run_inodes": held * (ranks + 2) + 3 * commits + _pictures(config),
        "written_bytes": commits * size,
        "dataset": None,
    }
    return report | {"dataset": _dataset(data)} if data else report


def _pictures(config: Config) -> int:
    every = config.sampling.every_steps
    return config.train.steps // every if every else 0


def _dataset(data: Data) -> dict[str, Any]:
    """The existing shards; of a preset, which has none, uncompressed latents of both views and flips."""
    size = inodes = 0
    estimated, numbers = False, stored_channels(data.plan.token_grid.latent_channels)
    for manifest in data.plan.manifests:
        if manifest.header.shards:
            size += manifest.header.totals["bytes"]
            inodes += len(manifest.header.shards) + len(manifest.header.columns) + 2
        else:
            tokens = manifest.size.astype(np.int64).prod(2).sum()
            size, estimated = size + int(tokens) * numbers * _LATENT_BYTES * _FLIPS, True
            inodes += -(-len(manifest.sample_id) // _SHARD_IMAGES)
    return {"bytes": size, "inodes": inodes, "estimated": estimated}
