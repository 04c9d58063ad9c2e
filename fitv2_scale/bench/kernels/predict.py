"""Predicts a training step on a GPU without one: counts it in other processes, then the roofline."""

import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.errors import UserError
from data_sharding.plan.pack_layout import PackShape
from fitv2_scale.bench.kernels.counts import CompiledBlock, OuterStep, Workload
from fitv2_scale.bench.kernels.gpus import gpu_named
from fitv2_scale.bench.kernels.report import report
from fitv2_scale.bench.kernels.roofline import predict
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from fitv2_scale.parallel.gpu_kernels import require_float8_compiler
from fitv2_scale.planning.forecast.assumptions import Assumptions
from fitv2_scale.planning.forecast.pack_statistics import data_statistics
from fitv2_scale.planning.forecast.predicted import not_predictable, read_table, with_row
from fitv2_scale.planning.forecast.step_time import exposed_seconds
from fitv2_scale.run.run import BAD_INPUT


def measure(
    config: Config, gpu: str, ranks: int = 1, nodes: int = 1, tokens: int | None = None, slots: int | None = None
) -> dict[str, Any]:
    """The report: counts of a block and of a step, and what follows from them.

    The shape of a pack is the largest of the run, or ``tokens`` and ``slots``. Raises UserError for a layout that this
    cannot predict, and where the data cannot be opened.
    """
    _refuse(config)
    require_float8_compiler(config.layout)
    device = gpu_named(gpu)
    if config.layout.attention == "flash4":
        device = device.with_flash4()
    layout = config.layout.over(ranks, nodes)
    work = workload(config, layout, ranks // nodes, nodes, tokens, slots)
    block, outer = _count(config, gpu, ranks, nodes, work)

    def exposed(computing: float) -> float:
        return exposed_seconds(config, layout, ranks // nodes, computing, work.packs, Assumptions().on_gpu(gpu))

    predicted = predict(config.model, block, outer, work, device, exposed)
    return report(config, layout, device, work, block, outer, predicted)


def add_to_table(file: str, config: Config, found: dict[str, Any]) -> None:
    """Adds the report ``found`` to a table of predictions like that of `fitv2 plan`, or makes one. Raises UserError if
    the file cannot be read or written."""
    block, result = found["block"], found["prediction"]
    figures = {
        "gpu": found["gpu"],
        "peak_tflops": found["assumed"]["peak_flops"]["value"] / 1e12,
        "torch": found["torch"],
        "tokens": found["workload"]["tokens"],
        **{name: result[name] for name in ("mfu", "seconds", "seconds_by_part", "host_seconds", "tokens_per_second")},
        "triton_kernels": [block[name]["triton_kernels"] for name in ("forward", "backward")],
        "triton_bytes_a_token": [block[name]["triton_bytes_a_token"] for name in ("forward", "backward")],
    }
    try:
        rows = read_table(Path(file)) if Path(file).exists() else []
        Path(file).write_text(json.dumps(with_row(rows, config, figures), indent=1) + "\n")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--table {file} is no table of predictions that can be written: {error}") from error


def _refuse(config: Config) -> None:
    if wrong := not_predictable(config.layout):
        raise UserError(
            f"{wrong[0]}: `fitv2 bench kernels` predicts compiled blocks in bf16 or fp8 with fsdp; leave it out"
        )


def workload(
    config: Config, layout: Layout, per_node: int, nodes: int, tokens: int | None, slots: int | None
) -> Workload:
    """A rank's part of a step, from the first window of the plan."""
    data = Data.open(config, (per_node,) * nodes)
    figures = data_statistics(config, data, layout.data_parallel)
    lengths = np.concatenate([data.plan.step(step).tokens for step in range(data.plan.window_length(0))]).astype(float)
    shape = data.shapes[0][-1]
    ranks = layout.data_parallel
    work = Workload(
        ranks=ranks,
        tokens=shape.tokens,
        slots=shape.images,
        max_seqlen=shape.max_seqlen,
        packs=figures["packs_per_rank"],
        fill=figures["fill"],
        keys=float((lengths**2).sum() / lengths.sum()),
        flops=figures["flops_a_step"] / ranks,
    )
    if tokens is None and slots is None:
        return work
    other = PackShape(tokens or shape.tokens, slots or shape.images, shape.max_seqlen)
    real = config.batch.images * figures["mean_tokens"] / ranks  # tokens of a rank's images
    packs = math.ceil(real / other.tokens)
    if not other.holds(other.tokens // other.max_seqlen, 0):
        raise UserError(f"--slots {other.images} are too few for {other.tokens} tokens in images of {other.max_seqlen}")
    return replace(work, tokens=other.tokens, slots=other.images, packs=packs, fill=real / packs / other.tokens)


def _count(config: Config, gpu: str, ranks: int, nodes: int, work: Workload) -> tuple[CompiledBlock, OuterStep]:
    asked = {
        "config": config.model_dump(mode="json"),
        "shape": {"tokens": work.tokens, "images": work.slots, "max_seqlen": work.max_seqlen},
        "gpu": gpu,
        "ranks": ranks,
        "nodes": nodes,
        "packs": max(1, round(work.packs)),
    }
    with ThreadPoolExecutor(2) as pool:
        block, outer = pool.map(counted, (asked | {"what": what} for what in ("block", "step")))
    return CompiledBlock.from_json(block), OuterStep.from_json(outer)


def counted(words: dict[str, Any]) -> dict[str, Any]:
    """The counts, made in a process of its own: it changes torch for itself."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "fitv2_scale.bench.kernels"],
            input=json.dumps(words),
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_CACHE_DIR": cache},
            capture_output=True,
            text=True,
        )
    if done.returncode == BAD_INPUT:
        raise UserError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"counting a {words['what']} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
