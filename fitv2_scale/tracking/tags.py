"""The tags of a run in MLflow, by which runs can be found and grouped. They hold no secrets: they come from run.json
and start.json, which are redacted.

    fitv2.family      "S/2", "B/2", "L/2", "XL/2", "3B/2"; "6x160" (depth x hidden) for any other network
    fitv2.network     "FiTv2-B/2", "DiT-XL/4"; "other-6x160/2" if no published family has its switches and objective
    fitv2.parameters  "2971928080"
    fitv2.dataset     the digest of the dataset's manifest; of several, with commas between
    fitv2.seed, fitv2.plan_hash, fitv2.recipe_hash
    fitv2.parent_run, fitv2.branch_step   the run id and step where a fork left
    fitv2.place       the run's folder when it was last published, by which another copy of it is told from a move
    fitv2.copy_of     of a folder that was copied and trained on by itself: the run id, which both have
    fitv2.attempt, fitv2.git, fitv2.gpu   of the newest attempt; gpu is "8 x NVIDIA H200" on its first node, or "none"
    fitv2.lag         "120 steps: 1120 measured, 1000 committed"
"""

from collections import Counter
from typing import Any

from fitv2_scale.config.families import SIZES, network_name
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.run.run import Run

RUN_ID = "fitv2.run_id"  # the canonical run
LIVE_ID = "fitv2.live_id"  # the run id, a slash and the attempt: the child that shows it live
COPY_OF = "fitv2.copy_of"
PLACE = "fitv2.place"
LAG = "fitv2.lag"
DATASET = "fitv2.dataset"
PARENT = "fitv2.parent_run"


def run_tags(run: Run) -> dict[str, str]:
    """Those that stay the same for the whole run."""
    model, parent = run.config.get("model", {}), run.parent or {}
    tags = {
        "fitv2.family": family(model),
        "fitv2.network": _network(model, run.config.get("objective", "flow")),
        "fitv2.seed": run.config.get("seed"),
        "fitv2.recipe_hash": run.recipe_hash,
        "fitv2.plan_hash": run.plan_hash,
        PARENT: parent.get("run"),
        "fitv2.branch_step": parent.get("step"),
    }
    return {key: str(value) for key, value in tags.items() if value is not None}


def attempt_tags(attempt: int, start: dict[str, Any]) -> dict[str, str]:
    """Those of an attempt, from its start.json."""
    gpus = Counter(gpu["name"] for gpu in start.get("gpus", []))
    tags = {
        "fitv2.attempt": attempt,
        "fitv2.git": start.get("git"),
        "fitv2.gpu": ", ".join(f"{n} x {name}" for name, n in gpus.items()) or "none",
        "fitv2.parameters": start.get("parameters"),
        DATASET: ",".join(start.get("datasets", [])) or None,
    }
    return {key: str(value) for key, value in tags.items() if value is not None}


def family(model: dict[str, Any]) -> str | None:
    """FiTv2's name of the network's size; None if the config has no depth or hidden size."""
    depth, hidden = model.get("depth"), model.get("hidden")
    if not depth or not hidden:
        return None
    size = SIZES["FiTv2"].get((depth, hidden))
    return f"{size}/{model.get('patch', 2)}" if size else f"{depth}x{hidden}"


def _network(model: dict[str, Any], objective: str) -> str | None:
    """None if this version does not know the network."""
    try:
        return network_name(ModelConfig.model_validate(model), objective)
    except ValueError:
        return None
