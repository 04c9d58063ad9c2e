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

_LOSSES = 3  # that the text names


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
        "assumed": {name: asdict(rate) for name, rate in vars(gpu).items() if isinstance(rate, Rate)},
    }


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
        f"block     {block['graphs']} graph, {block['breaks']} breaks",
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
        "losses    " + "; ".join(f"{part} {1000 * s:.0f} ms" for part, s in list(result["losses"].items())[:_LOSSES]),
    ]
    return "\n".join([*lines, *(f"assumed   {n} {r['value']:g}: {r['source']}" for n, r in found["assumed"].items())])


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
