"""What `fitv2 plan` tells before a run is started: the network's size, its state's memory, how the data will pack."""

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from data_sharding.deal import deal
from data_sharding.errors import DataError
from fitv2_scale.config import Config
from fitv2_scale.data import Data
from fitv2_scale.model.config import ModelConfig
from fitv2_scale.model.counts import forward_flops, logical_shapes, parameter_count
from fitv2_scale.parallel.memory import Compute, StateBytes, cuda_peak, saved_bytes, state_bytes
from fitv2_scale.parallel.mesh import Layout


def forecast(config: Config, ranks: int, nodes: int = 1) -> dict[str, Any]:
    """The figures as plain data, with as many of the ``ranks`` on each node. ``data`` is None, with the reason in
    ``data_missing``, where there is no dataset."""
    layout = Layout.of(ranks, config.layout.replicate, config.layout.tensor)
    state = plan_state(config, layout)
    report = {"model": _model(config.model), "layout": _layout(config, layout, state), "data": None}
    try:
        data = Data.open(config, layout.nodes([str(rank * nodes // ranks) for rank in range(ranks)]))
    except DataError as error:
        return report | {"data_missing": str(error)}
    figures = _data(config, data, layout.data_parallel)
    compute = plan_compute(config, figures["packs_per_rank"], figures["capacities"][-1], on_cuda=True)
    return report | {"data": figures, "cuda": _cuda(config, layout, state, compute)}


def plan_state(config: Config, layout: Layout) -> StateBytes:
    """Of the first rank: none holds more."""
    return state_bytes(config.layout.engine, config.model, layout, config.trainable, config.layout.precision, rank=0)


def plan_compute(config: Config, packs: float, tokens: int, on_cuda: bool) -> Compute:
    """How a rank will compute ``packs`` a step, on average, of at most ``tokens``."""
    compiled = on_cuda if config.layout.compile == "auto" else config.layout.compile
    return Compute(config.layout.checkpointing, compiled, config.layout.precision, math.ceil(packs), tokens)


def _model(model: ModelConfig) -> dict[str, Any]:
    return {
        "parameters": parameter_count(model),
        "tensors": len(logical_shapes(model)),
        "forward_flops_per_image": {str(n): forward_flops(model, n) for n in (256, 1024)},
        "training_flops_per_image": {str(n): 3 * forward_flops(model, n) for n in (256, 1024)},
    }


def _layout(config: Config, layout: Layout, state: StateBytes) -> dict[str, Any]:
    return {
        "ranks": layout.data_parallel * layout.tensor,
        "engine": config.layout.engine,
        **asdict(layout),
        "state_bytes_per_rank": asdict(state) | {"held": state.held},
    }


def _cuda(config: Config, layout: Layout, state: StateBytes, compute: Compute) -> dict[str, Any]:
    return asdict(compute) | {
        "saved_bytes": saved_bytes(config.model, layout, compute),
        "peak_bytes": cuda_peak(config.model, layout, state, compute),
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
        dealt = deal(lengths, data.cost, data.nodes, data.shapes)
        cost = data.cost.of(lengths)
        loads = [sum(int(cost[pack].sum()) for pack in rank) for rank in dealt.packs]
        packs, tokens = packs + len(dealt.packs[0]), tokens + int(lengths.sum())
        room += ranks * len(dealt.packs[0]) * dealt.shape.tokens
        imbalance += max(loads) * ranks / sum(loads)
    return {"packs_per_rank": packs / len(steps), "fill": tokens / room, "imbalance": imbalance / len(steps)}


def to_text(report: dict[str, Any]) -> str:
    model, layout, data = report["model"], report["layout"], report["data"]
    state = {name: f"{size / 2**30:.2f}" for name, size in layout["state_bytes_per_rank"].items()}
    lines = [
        f"model    {model['parameters']:,} parameters in {model['tensors']} tensors, "
        f"{model['training_flops_per_image']['256'] / 1e12:.3f} TFLOP to train on an image of 256 tokens",
        f"layout   {layout['ranks']} ranks, {layout['engine']} "
        f"(replicate {layout['replicate']} x shard {layout['shard']} x tensor {layout['tensor']})",
        f"state    {state['held']} GiB a rank: weights {state['weights']}, moments {state['moments']}, "
        f"EMA {state['ema']}; gradients {state['gradients']} more, {state['accumulated']} between the packs of a step",
    ]
    if data is None:
        return "\n".join([*lines, f"data     {report['data_missing']}"])
    capacities, cuda = " or ".join(map(str, data["capacities"])), report["cuda"]
    return "\n".join(
        [
            *lines,
            f"peak     about {cuda['peak_bytes'] / 2**30:.1f} GiB on a GPU, {cuda['saved_bytes'] / 2**30:.1f} of them "
            f"saved for the backward pass (checkpointing {cuda['checkpointing']})",
            f"data     {data['images']:,} images, {data['classes']} classes, {data['mean_tokens']:.1f} tokens each, "
            f"{data['epochs']:.1f} epochs of {data['steps_per_epoch']:.1f} steps",
            f"packs    {data['packs_per_rank']:.2f} a rank and step of {capacities} tokens: "
            f"fill {data['fill']:.4f}, slowest rank {data['imbalance']:.4f} of the mean",
            f"compute  {data['training_flops']:.3g} FLOP in all",
        ]
    )
