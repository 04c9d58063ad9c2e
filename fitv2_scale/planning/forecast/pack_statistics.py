"""How a run's data are divided among ranks and packs: images, tokens, fill and balance."""

from dataclasses import replace
from typing import Any

import numpy as np

from data_sharding.plan.balance import Nodes, assign_packs
from data_sharding.plan.pack_shapes import shapes_for_plan
from fitv2_scale.config.layout import LayoutConfig
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from fitv2_scale.model.counts import forward_flops

_SAMPLED_STEPS = 16  # for numbers of ranks other than the one that was asked for


def data_statistics(config: Config, data: Data, ranks: int) -> dict[str, Any]:
    """Statistics of the first window, divided among ``ranks``."""
    plan, steps = data.plan, data.plan.window_length(0)
    packing = measure_packing(data, ranks, range(steps))
    lengths = np.concatenate([plan.step(step).tokens for step in range(steps)])
    values, counts = np.unique(lengths, return_counts=True)
    flops = sum(3 * forward_flops(config.model, int(n)) * int(c) for n, c in zip(values, counts, strict=True))
    images, batch = sum(plan.samples), config.batch.images
    return {
        "images": images,
        "classes": data.classes,
        "mean_tokens": float(lengths.mean()),
        "steps_per_epoch": images / batch,
        "epochs": config.train.steps * batch / images,
        "capacities": [shape.tokens for shape in data.shapes[0]],
        **packing,
        "flops_a_step": flops / steps,
        "training_flops": config.train.steps * flops // steps,
    }


def measure_packing(data: Data, ranks: int, steps: range) -> dict[str, float]:
    """Packs per rank and step, fill (valid tokens over capacity, all ranks), and imbalance (cost of the slowest rank
    over the mean, averaged over the steps), when ``steps`` are divided among ``ranks``."""
    packs, tokens, room, imbalance = 0, 0, 0, 0.0
    for step in steps:
        lengths = data.plan.step(step).tokens
        assignment = assign_packs(lengths, data.cost, data.nodes, data.shapes[0])
        loads = assignment.loads(data.cost.of(lengths))
        packs, tokens = packs + assignment.count, tokens + int(lengths.sum())
        room += ranks * assignment.count * assignment.shape.tokens
        imbalance += int(loads.max()) * ranks / int(loads.sum())
    return {"packs_per_rank": packs / len(steps), "fill": tokens / room, "imbalance": imbalance / len(steps)}


def packing_on(data: Data, nodes: Nodes, layout: LayoutConfig) -> tuple[dict[str, float], int]:
    """``measure_packing`` over some steps of ``data`` on other ``nodes`` (data-parallel ranks of each), and the largest
    capacity."""
    shapes = shapes_for_plan(data.plan, data.cost, nodes, layout.max_tokens, multiple_of=layout.pad_to_multiple_of)
    steps = range(0, data.plan.window_length(0), max(1, data.plan.window_length(0) // _SAMPLED_STEPS))
    packing = measure_packing(replace(data, nodes=nodes, shapes=shapes), sum(nodes), steps)
    return packing, shapes[0][-1].tokens
