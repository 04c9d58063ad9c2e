"""Which kernels a training step spends its time in.

    python -m tests.gpu.step_profile CONFIG [key=value …]    prints JSON; without a GPU, operators of the CPU

Two steps before it compile and fill caches. Times are those of the device, so a share is one of its busy time.
"""

import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fitv2_scale.bench.step_data import open_steps
from fitv2_scale.config.load import load_config
from fitv2_scale.config.schema import Config
from fitv2_scale.model.objectives import make_objective
from fitv2_scale.parallel.agreement import read_alike
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.rank_facts import read_data
from fitv2_scale.parallel.world import join
from fitv2_scale.train.step import train_step

_SHOWN = 40  # kernels, those that take longest
# The first that a kernel's name contains. Copies before the optimizer: FSDP's copies run under its multi_tensor_apply.
_KINDS = {
    "attention": r"flash|fmha|attention",
    "copies": r"[Mm]em(cpy|set)|[Cc]opy|CatArray|chunk_cat",
    "compiled elementwise": r"^triton_",
    "optimizer": r"multi_tensor_apply|adam",
    "products": r"gemm|nvjet|cutlass|xmma|::(add)?mm$|::bmm$",
}
OTHER = "other"


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, kernel)), OTHER)


def measure(config: Config) -> dict[str, Any]:
    """ms and calls of the step's kernels by kind, and of each that takes long."""
    with join() as world:
        layout, data = read_alike(world, lambda: read_data(config, world))
        engine = make_engine(config, layout, world)
        with open_steps(config, data, layout.data_rank(world.rank), 1) as batches:
            batch = next(batches)
        on_cuda, objective = world.device.type == "cuda", make_objective(config, world.device)
        for _ in range(2):
            train_step(engine, batch, objective, config, world.device)
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of its own profiler
            with profile(activities=activities) as profiler:
                train_step(engine, batch, objective, config, world.device)
                if on_cuda:
                    torch.cuda.synchronize()
    return summary(list(_kernels(profiler, on_cuda)))


def _kernels(profiler: profile, on_cuda: bool) -> Iterator[tuple[str, float, int]]:
    """Name, ms and calls."""
    for row in profiler.key_averages():
        if on_cuda and row.device_type == DeviceType.CUDA and not row.is_user_annotation:
            yield row.key, row.self_device_time_total / 1000, row.count
        elif not on_cuda and row.device_type == DeviceType.CPU:
            yield row.key, row.self_cpu_time_total / 1000, row.count


def summary(kernels: list[tuple[str, float, int]]) -> dict[str, Any]:
    total, by_kind = sum(ms for _, ms, _ in kernels), Counter()
    for name, ms, _ in kernels:
        by_kind[kind_of(name)] += ms
    longest = sorted(kernels, key=lambda kernel: -kernel[1])[:_SHOWN]
    return {
        "ms": total,
        "percent": {kind: 100 * by_kind[kind] / total for kind in (*_KINDS, OTHER)},
        "kernels": [
            {"name": name[:160], "kind": kind_of(name), "ms": ms, "calls": calls} for name, ms, calls in longest
        ],
    }


if __name__ == "__main__":
    print(json.dumps(measure(load_config(sys.argv[1], sys.argv[2:])), indent=1))
