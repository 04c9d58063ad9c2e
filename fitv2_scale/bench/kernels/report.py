"""The report of `fitv2 bench kernels`, as plain data and as text. All of it is predicted."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from fitv2_scale.bench.kernels.counts import CompiledBlock, Kernel, OuterStep, Workload
from fitv2_scale.bench.kernels.gpus import Gpu, Rate
from fitv2_scale.bench.kernels.roofline import Prediction, launches
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.model.counts import parameter_count
from fitv2_scale.planning.forecast.words import counted

_LOSSES = 3  # that the text names
MEANING = {  # of a loss, by its name
    "products": "matrix products below the peak: tiles that leave processors empty, and the rate that products reach",
    "attention": "its kernels below the peak: scores computed again in the backward pass, heads that are padded",
    "elementwise": "norms, RoPE, SiLU, gates and sums in Triton kernels, which move bytes and do no FLOPs that count",
    "weights and gradients outside the blocks": "FSDP's copies and casts of both, embedding, last layer",
    "data and noise": "copies of the batch, noise and targets",
    "optimizer": "norm, clipping, AdamW and EMA, which move bytes",
    "the GPU waits for the host": "the host starts operations more slowly than the GPU computes them",
    "transfers": "collectives that computation does not hide",
}
_UNITS = {"flops": ("FLOP/s", "TFLOP/s", 1e12), "bytes": ("bytes/s", "TB/s", 1e12), "seconds": ("s", "µs", 1e-6)}
_TIMES = ("times", "times", 1.0)  # of what has no unit


def report(
    config: Config,
    layout: Layout,
    gpu: Gpu,
    work: Workload,
    block: CompiledBlock,
    outer: OuterStep,
    prediction: Prediction,
) -> dict[str, Any]:
    """The report as plain data."""
    kernels = len((*block.forward, *block.backward))
    optimizer = sum(op.count * op.bytes for op in outer.of("step"))
    return {
        "predicted": True,
        "gpu": gpu.name,
        "torch": torch.__version__,
        "model": {"parameters": parameter_count(config.model), **config.model.model_dump(mode="json")},
        "layout": {**asdict(layout), "checkpointing": config.layout.checkpointing},
        "workload": asdict(work),
        "block": {
            "graphs": block.graphs,
            "breaks": block.breaks,
            "forward": pass_figures(block.forward, work.tokens),
            "backward": pass_figures(block.backward, work.tokens),
        },
        "step": {
            "optimizer_bytes": optimizer,
            "optimizer_bytes_a_number": optimizer / outer.trained,
            "copied_bytes": sum(op.count * op.bytes for phase in ("forward", "backward") for op in outer.of(phase)),
            "collectives": [_collective(op) for op in outer.collectives()],
            "host_operations": round(config.model.depth * work.packs * kernels) + launches(outer.operations),
        },
        "prediction": asdict(prediction),
        "decided_by": "host" if prediction.host_seconds > sum(prediction.seconds_by_part.values()) else "GPU",
        "assumed": {
            name: asdict(rate) | {"unit": _units(name)[0]} for name, rate in vars(gpu).items() if isinstance(rate, Rate)
        },
    }


def _units(rate: str) -> tuple[str, str, float]:
    """The unit of a rate by its name, that of the text, and how many of the first are one of the second."""
    return _UNITS.get(rate.rpartition("_")[2], _TIMES)


def pass_figures(kernels: Sequence[Kernel], tokens: int) -> dict[str, Any]:
    """Of a block's forward or backward pass over ``tokens`` tokens."""
    triton = [kernel for kernel in kernels if kernel.kind == "triton"]
    products = Counter(kernel.product for kernel in kernels if kernel.product)
    return {
        "triton_kernels": len(triton),
        "triton_bytes_a_token": sum(kernel.bytes for kernel in triton) / tokens,
        "library_calls": len(kernels) - len(triton),
        "products": [
            {"rows": rows, "columns": columns, "summed": summed, "calls": calls}
            for (rows, columns, summed), calls in products.items()
        ],
        "kernels": [
            {"name": kernel.name, "kind": kernel.kind, "bytes_a_token": kernel.bytes / tokens} for kernel in kernels
        ],
    }


def _collective(op: Any) -> dict[str, Any]:
    return {"pass": op.phase, "name": op.name, "dtype": op.dtype, "bytes": op.bytes, "calls": op.count}


def to_text(found: dict[str, Any]) -> str:
    work, block, step, result = (found[key] for key in ("workload", "block", "step", "prediction"))
    lines = [
        f"Predicted for {work['ranks']} x {found['gpu']}, which this machine need not have: nothing here was measured "
        "on a GPU.",
        f"pack      {work['tokens']:,} tokens in {work['slots']} slots; {work['packs']:.2f} packs a step and rank, "
        f"fill {work['fill']:.4f}",
        f"block     {counted(block['graphs'], 'graph')}, {counted(block['breaks'], 'break')}",
    ]
    for name in ("forward", "backward"):
        lines += _pass_lines(name, block[name])
    lines += [
        f"step      {step['host_operations']:,} operations that the host starts; optimizer "
        f"{step['optimizer_bytes'] / 1e9:.2f} GB, {step['optimizer_bytes_a_number']:.2f} bytes a number; outside the "
        f"blocks {step['copied_bytes'] / 1e9:.1f} GB",
        *(
            f"          {c['pass']:<9} {c['calls']:>4} x {c['name'].strip('_')} of {c['bytes']:,} bytes, {c['dtype']}"
            for c in step["collectives"]
        ),
        f"predicted {1000 * result['seconds']:.4g} ms a step, MFU {result['mfu']:.3f}, "
        f"{result['tokens_per_second']:,.0f} tokens/s of a GPU; products at "
        f"{result['product_flops'] / 1e12:.0f} TFLOP/s",
        *(f"          {1000 * s:8.1f} ms {part}" for part, s in result["seconds_by_part"].items()),
        f"          {1000 * result['host_seconds']:8.1f} ms of the host, beside them; "
        f"{1000 * result['exposed_seconds']:.1f} ms waiting for transfers",
        f"          {_decided(found)}",
    ]
    return "\n".join([*lines, *_loss_lines(result), *_assumed_lines(found["assumed"])])


def _decided(found: dict[str, Any]) -> str:
    result, operations = found["prediction"], found["step"]["host_operations"]
    gpu, host = 1000 * sum(result["seconds_by_part"].values()), 1000 * result["host_seconds"]
    if found["decided_by"] == "host":
        return (
            f"The host decides: it needs {host:.1f} ms for FSDP's hooks and to start {operations:,} operations, which "
            f"the GPU computes in {gpu:.1f} ms. So faster kernels alone do not shorten the step."
        )
    return f"The GPU decides: it computes for {gpu:.1f} ms, and the host needs {host:.1f} ms beside it."


def _loss_lines(result: dict[str, Any]) -> list[str]:
    lost = sum(result["losses"].values())
    largest = list(result["losses"].items())[:_LOSSES]
    return [f"losses    {1000 * lost:.1f} ms more than the step's FLOPs take at the peak; the largest:"] + [
        f"          {1000 * seconds:8.1f} ms {part}: {MEANING[part]}" for part, seconds in largest
    ]


def _assumed_lines(assumed: dict[str, Any]) -> list[str]:
    lines = []
    for name, rate in assumed.items():
        _, unit, scale = _units(name)
        lines.append(f"assumed   {name} {rate['value'] / scale:g} {unit}: {rate['source']}")
    return lines


def _pass_lines(name: str, figures: dict[str, Any]) -> list[str]:
    lines = [
        f"{name:<9} {figures['triton_kernels']} Triton kernels, {figures['triton_bytes_a_token']:,.0f} bytes a token; "
        f"{figures['library_calls']} calls of libraries"
    ]
    lines += [
        f"          {kernel['bytes_a_token']:>9,.0f} bytes a token {kernel['name']}"
        for kernel in figures["kernels"]
        if kernel["kind"] == "triton"
    ]
    return lines + [
        f"          {p['calls']} x product ({p['rows']:,} x {p['summed']:,}) ({p['summed']:,} x {p['columns']:,})"
        for p in figures["products"]
    ]
