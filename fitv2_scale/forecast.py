"""What `fitv2 plan` tells before a run is started: the network's size, its state's memory, how the data will pack."""

from typing import Any

import numpy as np

from data_sharding.deal import deal
from data_sharding.errors import DataError
from fitv2_scale.config import Config
from fitv2_scale.model.config import ModelConfig
from fitv2_scale.model.counts import forward_flops, logical_shapes, parameter_count
from fitv2_scale.parallel.mesh import Layout
from fitv2_scale.session import Data

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
    plan, shape = data.plan, data.shape
    packs, tokens, imbalance = 0, 0, []
    for step in range(plan.window_steps):
        lengths = plan.step(step).tokens
        dealt = deal(lengths, data.cost, ranks, shape)
        cost = data.cost.of(lengths)
        loads = [sum(int(cost[pack].sum()) for pack in rank) for rank in dealt]
        packs, tokens = packs + len(dealt[0]), tokens + int(lengths.sum())
        imbalance.append(max(loads) * ranks / sum(loads))
    images = plan.samples
    return {
        "images": images,
        "classes": len(plan.manifest.classes),
        "mean_tokens": tokens / (plan.window_steps * plan.images),
        "steps_per_epoch": images / plan.images,
        "epochs": config.train.steps * plan.images / images,
        "capacity": shape.tokens,
        "image_slots": shape.images,
        "packs_per_rank": packs / plan.window_steps,
        "fill": tokens / (packs * ranks * shape.tokens),
        "imbalance": float(np.mean(imbalance)),
        "training_flops": config.train.steps * _flops_per_step(config, data),
    }


def _flops_per_step(config: Config, data: Data) -> int:
    """Mean over the first window's steps."""
    per_length = {}
    for step in range(data.plan.window_steps):
        for length, count in zip(*np.unique(data.plan.step(step).tokens, return_counts=True), strict=True):
            per_length[int(length)] = per_length.get(int(length), 0) + int(count)
    return sum(3 * forward_flops(config.model, n) * c for n, c in per_length.items()) // data.plan.window_steps


def to_text(report: dict[str, Any]) -> str:
    model, layout, data = report["model"], report["layout"], report["data"]
    gib = layout["state_bytes_per_rank"]["total"] / 2**30
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
            f"packs    {data['packs_per_rank']:.2f} a rank and step of {data['capacity']} tokens: "
            f"fill {data['fill']:.4f}, slowest rank {data['imbalance']:.4f} of the mean",
            f"compute  {data['training_flops']:.3g} FLOP in all",
        ]
    )
