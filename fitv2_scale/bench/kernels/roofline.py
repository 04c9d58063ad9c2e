"""From counts and rates to the time of a step: arithmetic alone.

Each kernel takes the longest of its FLOPs at their rate, its bytes at theirs, and the shortest time of a kernel; they
follow one another. Products are computed in tiles, one a processor, so their rate falls with the share of the
processors that the last round leaves empty. Work per token is that of a block at the counted shape. The host works
beside the GPU; a step takes as long as the slower of the two, and the transfers that computation does not hide.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fitv2_scale.bench.kernels.counts import FLOAT8, CompiledBlock, Kernel, Operation, OuterStep, Workload
from fitv2_scale.bench.kernels.gpus import Gpu
from fitv2_scale.config.model import ModelConfig

_BACKWARD_OF_ATTENTION = 2.5  # its products over those of the forward pass: scores are computed again
_LEAST_SUMMED = 1024  # terms of a product's sum that are not split further
_FLOAT32 = 4
_HEAD_DIMS = (32, 64, 96, 128, 192, 256)  # that FlashAttention 2 has kernels for: others are padded to the next


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step of one rank. ``seconds_by_part`` are those of the GPU, one after the other."""

    seconds: float
    mfu: float
    tokens_per_second: float  # of the rank, without padding
    seconds_by_part: dict[str, float]
    host_seconds: float
    exposed_seconds: float  # transfers that computation does not hide
    product_flops: float  # the rate of all products together
    losses: dict[str, float]  # seconds above FLOPs at the GPU's peak, largest first; with it they add up to the step


def predict(
    model: ModelConfig,
    block: CompiledBlock,
    outer: OuterStep,
    work: Workload,
    gpu: Gpu,
    exposed: Callable[[float], float],
) -> Prediction:
    """``exposed`` gives, for the seconds of a step's computation, those of transfers that it does not hide."""
    kernels = (*block.forward, *block.backward)
    blocks = model.depth * work.packs
    products = [kernel for kernel in kernels if kernel.kind == "product"]
    parts = {
        "products": blocks * sum(_product_kernel_seconds(kernel, gpu) for kernel in products),
        "attention": blocks * sum(_attention_seconds(block, model, work, gpu)),
        "elementwise": blocks * sum(_elementwise_seconds(k, gpu) for k in kernels if k.kind in ("triton", "other")),
        "weights and gradients outside the blocks": _outer_seconds(outer, ("forward", "backward"), gpu),
        "data and noise": _outer_seconds(outer, ("data",), gpu),
        "optimizer": _outer_seconds(outer, ("step",), gpu),
    }
    host = _host_seconds(model, block, outer, work, gpu)
    on_gpu = sum(parts.values())
    waiting = exposed(on_gpu)
    seconds = max(on_gpu, host) + waiting
    ideal, attention = work.flops / gpu.peak_flops.value, blocks * _attention_ideal(model, work, gpu)
    losses = parts | {"products": parts["products"] + attention - ideal, "attention": parts["attention"] - attention}
    losses |= {"the GPU waits for the host": max(0.0, host - on_gpu), "transfers": waiting}
    return Prediction(
        seconds=seconds,
        mfu=ideal / seconds,
        tokens_per_second=work.packs * work.tokens * work.fill / seconds,
        seconds_by_part=parts,
        host_seconds=host,
        exposed_seconds=waiting,
        product_flops=blocks * sum(2 * math.prod(k.product) for k in products if k.product) / parts["products"],
        losses=dict(sorted(losses.items(), key=lambda loss: -loss[1])),
    )


def product_seconds(rows: int, columns: int, summed: int, gpu: Gpu, float8: bool = False) -> float:
    """A product, in bf16 or fp8, without its bytes. Where its tiles leave processors empty, the sum of each tile is
    split among them, and the parts, in float32, are written and added."""
    tiles = math.ceil(rows / gpu.tile[0]) * math.ceil(columns / gpu.tile[1])
    parts = max(1, min(gpu.processors // tiles, summed // _LEAST_SUMMED))
    waves = math.ceil(tiles * parts / gpu.processors)
    full = gpu.float8_flops if float8 else gpu.product_flops
    rate = full.value * tiles * parts / (waves * gpu.processors)
    added = 2 * _FLOAT32 * parts * rows * columns / gpu.elementwise_bytes.value if parts > 1 else 0.0
    return 2 * rows * columns * summed / rate + added


def _product_kernel_seconds(kernel: Kernel, gpu: Gpu) -> float:
    assert kernel.product is not None
    return max(product_seconds(*kernel.product, gpu, kernel.name == FLOAT8), _elementwise_seconds(kernel, gpu))


def _elementwise_seconds(kernel: Kernel, gpu: Gpu) -> float:
    return max(kernel.bytes / gpu.elementwise_bytes.value, gpu.kernel_seconds.value)


def _attention_seconds(block: CompiledBlock, model: ModelConfig, work: Workload, gpu: Gpu) -> Iterable[float]:
    padded = next(dim for dim in _HEAD_DIMS if dim >= model.head_dim) / model.head_dim
    flops = _attention_flops(model, work) / work.fill * padded
    for kernel in (*block.forward, *block.backward):
        if kernel.kind == "attention" and "backward" in kernel.name:
            yield _BACKWARD_OF_ATTENTION * flops / gpu.attention_backward_flops.value + _copied(kernel, gpu)
        elif kernel.kind == "attention":
            yield flops / gpu.attention_forward_flops.value + _copied(kernel, gpu)


def _copied(kernel: Kernel, gpu: Gpu) -> float:
    return kernel.bytes / gpu.copy_bytes.value


def _attention_flops(model: ModelConfig, work: Workload) -> float:
    """Of one forward pass of a pack's images through a block, without padding: two products of 2 D FLOPs a pair."""
    return work.tokens * work.fill * 4 * model.hidden * work.keys


def _attention_ideal(model: ModelConfig, work: Workload, gpu: Gpu) -> float:
    return 3 * _attention_flops(model, work) / gpu.peak_flops.value


def _outer_seconds(outer: OuterStep, phases: Iterable[str], gpu: Gpu) -> float:
    return sum(
        op.count * max(op.bytes / gpu.copy_bytes.value, gpu.kernel_seconds.value)
        for op in outer.operations
        if op.phase in phases and not op.collective
    )


def _host_seconds(model: ModelConfig, block: CompiledBlock, outer: OuterStep, work: Workload, gpu: Gpu) -> float:
    blocks = model.depth * work.packs
    started = blocks * len((*block.forward, *block.backward)) + launches(outer.operations)
    return started * gpu.launch_seconds.value + 2 * blocks * gpu.block_seconds.value


def launches(operations: Iterable[Operation]) -> int:
    """Operations that the host starts."""
    return sum(op.count for op in operations)
