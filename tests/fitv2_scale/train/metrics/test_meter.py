"""The metrics of a window, against numbers worked out by hand."""

import math
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.counts import forward_flops
from fitv2_scale.model.loss_groups import GROUPS
from fitv2_scale.train.metrics.accounting import Accounting, Elapsed
from fitv2_scale.train.metrics.meter import Meter, StepNumbers

MODEL = ModelConfig(depth=1, hidden=32, heads=2)
STEP = {"step_images": 3, "step_substituted": 1, "step_tokens": 30, "step_capacity": 40, "step_cost_mean": 2.0}


def numbers(loss: float, norm: float, skipped: bool, at: float) -> StepNumbers:
    """Half of the loss at times below a quarter, with a quarter of the weight there."""
    sums = np.zeros((2, len(GROUPS)))
    sums[:, :3] = (loss, loss / 2, loss / 2), (1.0, 0.25, 0.75)
    return StepNumbers(sums, norm, skipped, Elapsed(at, 1.0, 0.5, 0.0))


@pytest.fixture
def meter() -> Meter:
    """Of two ranks, of which the other has the same numbers."""
    world = SimpleNamespace(
        size=2, device=torch.device("cpu"), hosts=("n1", "n1"), all_reduce_sum=lambda mine: 2 * mine
    )
    clock = SimpleNamespace(now=lambda: Elapsed(0.0, 0.0, 0.0, 0.0))
    created = datetime.now(UTC).isoformat()
    rest = {"created": created, "peak_tflops": 1.0, "loss_counts": True, "spike_sigma": 0.0}
    return Meter(world, MODEL, 16, Accounting(), clock, **rest)


def test_a_window(meter):
    batches = [
        SimpleNamespace(step=step, step_lengths=np.array([10, 16, 4]), step_cost_max=cost, **STEP)
        for step, cost in enumerate((3.0, 5.0, 2.0))
    ]
    results = numbers(0.5, 2.0, False, 2.0), numbers(9.0, math.inf, True, 3.0), numbers(1.5, 4.0, False, 5.5)
    for batch, result in zip(batches, results, strict=True):
        meter.update(batch, result, 0.4)
    found, spikes = meter.report()
    flops = 3 * 3 * sum(forward_flops(MODEL, n) for n in (10, 16, 4))
    expected = {
        "loss": (1.0 + 3.0) / 2,
        "loss_min": 1.0,
        "loss_max": 3.0,
        "loss_t0": (0.25 + 0.75) / (2 * 0.25),
        "loss_t1": (0.25 + 0.75) / (2 * 0.75),
        "grad_norm": 3.0,
        "images_per_second": 9 / 4.0,  # 5.5 s, of which 1 s went to evaluation and 0.5 s to a checkpoint
        "tokens_per_second": 90 / 4.0,
        "packing_fill": 90 / 120,
        "rank_imbalance": (1.5 + 2.5 + 1.0) / 3,
        "data_wait_share": 1.2 / 4.0,
        "skipped_steps": 1.0,
        "substituted_images": 3.0,
        "mfu": flops / 4.0 / 2e12,
        "tokens": 90.0,
        "flops": float(flops),
        "checkpoint_stall_seconds": 0.5,
        "evaluation_seconds": 1.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert spikes == [] and meter.steps == 0


def test_a_window_of_skipped_steps_has_no_loss(meter):
    batch = SimpleNamespace(step=0, step_lengths=np.array([4]), step_cost_max=2.0, **STEP)
    meter.update(batch, numbers(9.0, 1.0, True, 2.0), 0.0)
    found, _ = meter.report()
    assert math.isnan(found["loss"]) and math.isnan(found["grad_norm"]) and found["skipped_steps"] == 1.0
