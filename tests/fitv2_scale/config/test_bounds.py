"""Numbers that no run can be made with are refused where they are read. Written down from what the keys mean."""

import pytest

from data_sharding.errors import UserError
from fitv2_scale.config.load import load_slurm, parse_config

LEAST = {"model": {"depth": 2, "hidden": 32, "heads": 2}, "data": {"url": "x"}, "train": {"steps": 5}}
# Counts of which there must be at least one; what may be zero but no less; what must be more than zero.
AT_LEAST_ONE = (
    "model.depth", "model.heads", "model.classes", "batch.images", "train.steps", "train.log_every",
    "train.max_skipped", "layout.replicate", "layout.tensor", "validation.images", "validation.timesteps",
    "sampling.columns", "sampling.cfg", "sampling.steps", "checkpoint.every_steps", "checkpoint.max_failed",
)  # fmt: skip
AT_LEAST_ZERO = (
    "seed", "flow.label_dropout", "ddpm.label_dropout", "ema.decay", "data.max_substituted", "train.spike_sigma",
    "validation.every_steps", "sampling.every_steps", "checkpoint.keep_every", "optimizer.warmup_steps",
    "optimizer.beta1", "optimizer.beta2", "optimizer.weight_decay",
)  # fmt: skip
MORE_THAN_ZERO = (
    "model.rope_theta", "data.cache_gib", "data.prefetch_gib", "data.cache_disk_gib", "tracking.peak_tflops",
    "sampling.atol", "sampling.rtol", "checkpoint.every_minutes", "watchdog.step_seconds", "watchdog.compile_seconds",
    "watchdog.load_seconds", "watchdog.data_seconds", "watchdog.save_seconds", "watchdog.evaluate_seconds",
    "optimizer.lr", "optimizer.eps", "optimizer.max_norm", "data.deadline_seconds",
)  # fmt: skip
LESS_THAN_ONE = ("ema.decay", "optimizer.beta1", "optimizer.beta2", "data.max_substituted")
OTHERS = (
    ("model.hidden", 4), ("data.deadline_seconds", 401), ("model.rope.train_side", 1), ("layout.max_tokens", 63),
    ("flow.label_dropout", 1.01), ("ddpm.label_dropout", 1.01),
    ("seed", 1 << 64), ("watchdog.step_factor", 1), ("checkpoint.keep_last", 1), ("checkpoint.milestones", [-1]),
)  # fmt: skip
SLURM = (
    ("tasks_per_node", 0), ("cpus_per_task", -1), ("fruitless", 0), ("exclude_minutes", -1), ("signal_seconds", -1),
    ("successors", -1),
)  # fmt: skip
REFUSED = [(key, 0) for key in (*AT_LEAST_ONE, *MORE_THAN_ZERO)] + [(key, -1) for key in AT_LEAST_ZERO]
REFUSED += [(key, 1) for key in LESS_THAN_ONE] + list(OTHERS)


def with_value(dotted: str, value: object) -> dict:
    *sections, key = dotted.split(".")
    tree = {name: dict(section) for name, section in LEAST.items()}
    place = tree
    for name in sections:
        place = place.setdefault(name, {})
    place[key] = value
    return tree


@pytest.mark.parametrize("key,value", REFUSED)
def test_a_number_out_of_its_bounds(key, value):
    with pytest.raises(UserError, match=f"{key.rpartition('.')[2]}.*(greater|less) than"):
        parse_config(with_value(key, value), "c.yaml")


@pytest.mark.parametrize("key,value", [(key, 1) for key in AT_LEAST_ONE if key != "train.steps"])
def test_one_is_enough(key, value):
    parse_config(with_value(key, value), "c.yaml")


@pytest.mark.parametrize("key", AT_LEAST_ZERO)
def test_zero_is_allowed(key):
    parse_config(with_value(key, 0), "c.yaml")


@pytest.mark.parametrize("key,value", SLURM)
def test_a_number_of_a_job_out_of_its_bounds(key, value):
    with pytest.raises(UserError, match=f"{key}.*greater than"):
        load_slurm([f"slurm.{key}={value}"])
