"""The memory of a rank: its state, and its peak on a GPU."""

import math
from dataclasses import asdict
from typing import Any

from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.parallel.memory_estimate import Compute, StateBytes, cuda_peak, saved_bytes, state_bytes


def plan_state(config: Config, layout: Layout) -> StateBytes:
    """State of the first rank; no rank holds more."""
    return state_bytes(config.layout.engine, config.model, layout, config.trainable, config.layout.precision, rank=0)


def plan_compute(config: Config, packs: float, tokens: int, on_cuda: bool) -> Compute:
    """How a rank computes ``packs`` packs per step (a mean) of at most ``tokens`` tokens."""
    layout = config.layout
    return Compute(
        layout.checkpointing,
        layout.compiles(on_cuda),
        layout.precision,
        math.ceil(packs),
        tokens,
        layout.reshard_after_forward,
        layout.prefetch_blocks,
    )


def memory_report(config: Config, layout: Layout, packs: float | None, tokens: int | None) -> dict[str, Any]:
    """Bytes of a rank. Without data (``packs`` or ``tokens`` None) the peak is None."""
    state = plan_state(config, layout)
    report: dict[str, Any] = {"state_bytes_per_rank": asdict(state) | {"held": state.held}, "cuda": None}
    if packs is not None and tokens is not None:
        compute = plan_compute(config, packs, tokens, on_cuda=True)
        report["cuda"] = asdict(compute) | {
            "saved_bytes": saved_bytes(config.model, layout, compute),
            "peak_bytes": cuda_peak(config.model, layout, state, compute),
        }
    return report
