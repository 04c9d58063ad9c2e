"""What a device gives to the products, the attention and the optimizer of FiTv2-3B/2, each alone.

    python -m tests.gpu.ceilings [--tiny]    prints JSON; --tiny: little enough for a CPU

Random data, medians of 12 after 3. Rates in TFLOP/s, where a multiply-add is two.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_sharding.plan.pack_layout import PackShape, lay_out
from fitv2_scale.config.load import load_config
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.attention import attention
from fitv2_scale.model.counts import parameter_count
from fitv2_scale.model.to_torch import packing_to_torch
from fitv2_scale.parallel.optimizer import AdamW, global_norm, step_result, update_ema
from tests.gpu.products import token_products

_WARM, _TIMED = 3, 12
_BYTES_A_NUMBER = 48  # of an update: norm 4, AdamW 32 (it writes the gradient back), EMA 12
_SAME = 4  # backward passes whose bits are compared


@dataclass(frozen=True)
class Sizes:
    tokens: tuple[int, ...]  # of packs: one of 16 images, one of four of 256, that rounded up to 128s, the largest
    images: int  # of 246 tokens, about what images of the 256-token data have
    long_images: int  # of 1,024 tokens
    numbers: int  # that an update is measured on
    square: int  # side of the product that shows the device's best
    copied: int  # bytes
    heads: int | None = None  # of the networks, instead of their own


FULL = Sizes((3952, 15752, 15872, 16384), 64, 16, 500_000_000, 8192, 1 << 31)
TINY = Sizes((48,), 2, 1, 10_000, 64, 1 << 16, heads=2)


class Device:
    """Makes random tensors and measures times."""

    def __init__(self, name: str):
        self.name, self.is_cuda = name, name == "cuda"

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.name, dtype=dtype)

    def seconds(self, act: Callable[[], object]) -> float:
        """Median time of ``act`` on the device."""
        for _ in range(_WARM):
            act()
        return statistics.median(self._time(act) for _ in range(_TIMED))

    def _time(self, act: Callable[[], object]) -> float:
        if not self.is_cuda:
            began = time.perf_counter()
            act()
            return time.perf_counter() - began
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        act()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended) / 1000


def products(device: Device, model: ModelConfig, tokens: int) -> dict[str, Any]:
    """The rate of each product of a block: forward, gradient of the input, gradient of the weight. ``all`` is that of
    the three of all products together."""
    found, seconds, flops = {}, 0.0, 0
    for name, (inputs, outputs) in token_products(model).items():
        x, w, b, g = map(
            lambda shape: device.random(*shape), ((tokens, inputs), (outputs, inputs), (outputs,), (tokens, outputs))
        )
        acts = {
            "forward": lambda x=x, w=w, b=b: torch.addmm(b, x, w.t()),
            "input gradient": lambda g=g, w=w: g @ w,
            "weight gradient": lambda g=g, x=x: g.t() @ x,
        }
        times = {which: device.seconds(act) for which, act in acts.items()}
        each = 2 * tokens * inputs * outputs
        found[name] = {which: each / t / 1e12 for which, t in times.items()}
        seconds, flops = seconds + sum(times.values()), flops + 3 * each
    return found | {"all": flops / seconds / 1e12}


def attend(
    device: Device, model: ModelConfig, size: tuple[int, int], images: int, deterministic: bool
) -> dict[str, Any]:
    """Attention over ``images`` of ``size`` (rows, columns), with the width and the heads of ``model``."""
    length, heads, dim = size[0] * size[1], model.heads, model.head_dim
    shape = PackShape(images * length, images, length)
    packing = packing_to_torch(lay_out([size] * images, shape)).to(torch.device(device.name))
    inputs = [device.random(images * length, heads, dim).requires_grad_() for _ in range(3)]
    gradient = device.random(images * length, heads, dim)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(*inputs, packing), inputs, gradient)

    torch.use_deterministic_algorithms(deterministic)
    try:
        with torch.no_grad():
            forward = device.seconds(lambda: attention(*inputs, packing))
        both = device.seconds(backward)
        first, *others = (backward() for _ in range(_SAME))
    finally:
        torch.use_deterministic_algorithms(False)
    flops = 4 * images * length**2 * heads * dim
    return {
        "forward": flops / forward / 1e12,
        "backward": 2.5 * flops / max(both - forward, 1e-9) / 1e12,
        "us a token and block": 1e6 * both / (images * length),
        "same bits each time": all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)),
    }


def update(device: Device, numbers: int, of_model: int) -> dict[str, float]:
    """Norm, AdamW and EMA, scaled to a network of ``of_model`` parameters."""
    weights, gradient, ema = (device.random(numbers, dtype=torch.float32) for _ in range(3))
    optimizer = AdamW({"all": weights}, load_config("configs/fitv2_3b2.yaml").optimizer)

    def step() -> None:
        result = step_result(global_norm([gradient], [], None, None))
        optimizer.step([weights], [gradient], result, lr=1e-4, max_norm=1.0)
        update_ema([ema], [weights], 0.9999, result.skipped)

    seconds = device.seconds(step)
    return {"ms": 1e3 * seconds * of_model / numbers, "TB/s": _BYTES_A_NUMBER * numbers / seconds / 1e12}


def copy(device: Device, size: int) -> float:
    """TB/s, read and written."""
    source, target = (torch.empty(size, device=device.name, dtype=torch.uint8) for _ in range(2))
    return 2 * size / device.seconds(lambda: target.copy_(source)) / 1e12


def measure(device: Device, sizes: Sizes) -> dict[str, Any]:
    b2, xl2, b3 = (load_config(f"configs/fitv2_{name}.yaml").model for name in ("b2", "xl2", "3b2"))
    if sizes.heads:
        b2, xl2, b3 = (
            m.model_copy(update={"heads": sizes.heads, "hidden": sizes.heads * m.head_dim}) for m in (b2, xl2, b3)
        )
    a, b = (device.random(sizes.square, sizes.square) for _ in range(2))
    image, long = (6, 41), (32, 32)
    cases = {f"head_dim {model.head_dim}": (model, image, sizes.images, False) for model in (b2, xl2, b3)}
    cases |= {"head_dim 96, deterministic": (b3, image, sizes.images, True)}
    cases |= {f"1,024 tokens{', deterministic' * d}": (b3, long, sizes.long_images, bool(d)) for d in (0, 1)}
    return {
        "copy, TB/s read and written": copy(device, sizes.copied),
        "square product": 2 * sizes.square**3 / device.seconds(lambda: a @ b) / 1e12,
        "products": {str(tokens): products(device, b3, tokens) for tokens in sizes.tokens},
        "attention": {name: attend(device, *case) for name, case in cases.items()},
        "update": update(device, sizes.numbers, parameter_count(b3)),
    }


if __name__ == "__main__":
    tiny = "--tiny" in sys.argv
    print(json.dumps(measure(Device("cpu" if tiny else "cuda"), TINY if tiny else FULL), indent=1))
