"""What `fitv2 plan` tells before a run is started: the network's size, its state's memory, how the data will pack."""

from typing import Any

import numpy as np

from data_sharding.deal import deal
from data_sharding.errors import DataError
from fitv2_scale.config import Config
from fitv2_scale.data import Data
from fitv2_scale.model.config import ModelConfig
from fitv2_scale.model.counts import forward_flops, logical_shapes, parameter_count
from fitv2_scale.parallel.mesh import Layout

_STATE_BYTES = {"parameters": 4, "gradients": 4, "moments": 8, "ema": 4}  # a parameter, all float32


def forecast(config: Config, ranks: int) -> dict[str, Any]:
    """The figures as plain data; ``data`` is None, with the reason in ``data_missing``, where there is no dataset."""
    layout = Layout.of(ranks, config.layout.replicate)
    report = {"model": _model(config.model), "layout": _layout(config, layout), "data": None}
    try:
        data = Data.open(config, layout.data_parallel)
    except DataError as error:
        return report | {"data_missing": str(error)}
    return report | {"data": _data(config, data, layout.data_parallel)}


def _model(model: ModelConfig) -> dict[str, Any]:
    return {
        "parameters": parameter_count(model),
        "tensors": len(logical_shapes(model)),
        "training_flops_per_image": {str(n): 3 * forward_flops(model, n) for n in (256, 1024)},
    }


def _layout(config: Config, layout: Layout) -> dict[str, Any]:
    parameters = parameter_count(config.model)
    state = {name: size * parameters // layout.shard for name, size in _STATE_BYTES.items()}
    return {
        "ranks": layout.data_parallel,
        "replicate": layout.replicate,
        "shard": layout.shard,
        "state_bytes_per_rank": state | {"total": sum(state.values())},
    }


def _data(config: Config, data: Data, ranks: int) -> dict[str, Any]:
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
        "capacities": [shape.tokens for shape in data.shapes],
        **packing,
        "training_flops": config.train.steps * flops // steps,
    }


def measure_packing(data: Data, ranks: int, steps: range) -> dict[str, float]:
    """Deals out ``steps``: packs a rank gets in a step, fill (valid tokens over room, all ranks), and imbalance (cost
    of the slowest rank over the mean, averaged over the steps)."""
    packs, tokens, room, imbalance = 0, 0, 0, 0.0
    for step in steps:
        lengths = data.plan.step(step).tokens
        dealt = deal(lengths, data.cost, ranks, data.shapes)
        cost = data.cost.of(lengths)
        loads = [sum(int(cost[pack].sum()) for pack in rank) for rank in dealt.packs]
        packs, tokens = packs + len(dealt.packs[0]), tokens + int(lengths.sum())
        room += ranks * len(dealt.packs[0]) * dealt.shape.tokens
        imbalance += max(loads) * ranks / sum(loads)
    return {"packs_per_rank": packs / len(steps), "fill": tokens / room, "imbalance": imbalance / len(steps)}


def to_text(report: dict[str, Any]) -> str:
    model, layout, data = report["model"], report["layout"], report["data"]
    gib = layout["state_bytes_per_rank"]["total"] / 2**30
    capacities = "" if data is None else " or ".join(map(str, data["capacities"]))
    lines = [
        f"model    {model['parameters']:,} parameters in {model['tensors']} tensors, "
        f"{model['training_flops_per_image']['256'] / 1e12:.3f} TFLOP to train on an image of 256 tokens",
        f"layout   {layout['ranks']} ranks (replicate {layout['replicate']} x shard {layout['shard']}), "
        f"{gib:.2f} GiB of weights, gradients, moments and EMA a rank",
    ]
    if data is None:
        return "\n".join([*lines, f"data     {report['data_missing']}"])
    return "\n".join(
        [
            *lines,
            f"data     {data['images']:,} images, {data['classes']} classes, {data['mean_tokens']:.1f} tokens each, "
            f"{data['epochs']:.1f} epochs of {data['steps_per_epoch']:.1f} steps",
            f"packs    {data['packs_per_rank']:.2f} a rank and step of {capacities} tokens: "
            f"fill {data['fill']:.4f}, slowest rank {data['imbalance']:.4f} of the mean",
            f"compute  {data['training_flops']:.3g} FLOP in all",
        ]
    )
