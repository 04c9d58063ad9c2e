"""Measures a training step on this machine: throughput, MFU, time by part, memory, and a comparison.

Throughput is measured over whole steps without pauses, as in training; the time of each part in separate steps, since
measuring it slows them down.
"""

import statistics
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data_sharding.errors import UserError
from data_sharding.stream.batch import StepBatch
from fitv2_scale.bench.released_recipe import ReferenceCheckpointing, ReleasedTrainer
from fitv2_scale.bench.spread import spread
from fitv2_scale.bench.step_rounds import Case, Round, Trainer, free, measure_steps, our_round, wait
from fitv2_scale.config.schema import Config
from fitv2_scale.model.counts import forward_flops
from fitv2_scale.model.objective import pack_loss
from fitv2_scale.model.to_torch import pack_to_torch
from fitv2_scale.parallel.agreement import agree, read_alike
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.gpu_kernels import training_kernels
from fitv2_scale.parallel.memory_estimate import cuda_peak
from fitv2_scale.parallel.optimizer import update_ema
from fitv2_scale.parallel.rank_facts import config_facts, read_data, software_facts
from fitv2_scale.parallel.world import join
from fitv2_scale.planning.forecast.memory_per_rank import plan_compute, plan_state
from fitv2_scale.train.metrics.meter import known_peak


def measure(
    config: Config, steps: int, repeats: int, reference: ReferenceCheckpointing | None = None
) -> dict[str, Any] | None:
    """All figures, on rank 0; None elsewhere. ``repeats`` rounds of ``steps`` steps, of ours and, unless it is None, of
    the reference in turn: ``reference`` is its activation checkpointing.

    Raises:
        UserError: the reference is requested with more than one process, or with another network than the released one.
    """
    with join() as world:
        if reference and world.size > 1:
            raise UserError("--against reference needs a single process: start it without torchrun")
        agree(world, config_facts(config) | software_facts(world.device) | {"steps": steps, "repeats": repeats})
        layout, data = read_alike(world, lambda: read_data(config, world))
        case = Case(config, world, layout, data, steps)
        with case.open() as stream:
            batches = list(stream)
        ours, theirs = [], []
        for done in range(1, repeats + 1):
            with training_kernels(config, world.device):
                ours.append(_ours(case, batches, split=done == repeats))
            free(world.device)
            if reference:
                theirs.append(_reference(case, batches, reference))
                free(world.device)
        if not world.is_first:
            return None
        report = _report(case, batches, ours)
        return report | {"reference": _compare(report, ours, theirs, reference)} if reference else report


def _ours(case: Case, batches: Sequence[StepBatch], split: bool) -> Round:
    trainer, found = our_round(case, batches)
    if not split:
        return found
    return replace(found, seconds_by_part=_parts(trainer, batches), syncs=_count_syncs(trainer, batches[0]))


def _reference(case: Case, batches: Sequence[StepBatch], checkpointing: ReferenceCheckpointing) -> Round:
    trainer = ReleasedTrainer(case.config, case.world.device, checkpointing)
    return measure_steps(trainer.step, batches, batches, case.world)


def _parts(trainer: Trainer, batches: Sequence[StepBatch]) -> dict[str, float]:
    """Seconds of each part of a step, medians over ``batches``; each part runs alone on the device.

    ``reduce`` is the extra time of the last backward pass over the same pass without a reduction; zero3 reduces in
    every pass, so there it is part of ``backward``. ``ema`` is the update alone, ``optimizer`` the rest of the step.
    """
    config, engine, device = trainer.config, trainer.engine, trainer.world.device
    ema, weights = _values(engine, "ema"), _values(engine, "param")
    never = torch.zeros((), device=device)
    clocks = []
    for batch in batches:
        clock = _Clock(device)
        for last, packs in ((False, batch.packs), (True, batch.packs[-1:])):
            for pack in packs:
                with clock("data"):
                    packed = pack_to_torch(pack, device)
                with clock("forward"):
                    loss = pack_loss(trainer.objective, engine.network, packed)
                with clock("backward with reduction" if last else "backward"):
                    engine.backward(loss, last)
        with clock("step"):
            engine.step(config.optimizer.lr_at(batch.step), config.optimizer.max_norm)
        with clock("ema"):
            update_ema(ema, weights, config.ema.decay, skipped=never)
        clocks.append(clock.times())
    packs = [len(batch.packs) for batch in batches]
    last_pack = [t["backward"][-1] for t in clocks]
    return {
        "data": statistics.median(sum(t["data"][:n]) for t, n in zip(clocks, packs, strict=True)),
        "forward": statistics.median(sum(t["forward"][:n]) for t, n in zip(clocks, packs, strict=True)),
        "backward": statistics.median(sum(t["backward"]) for t in clocks),
        "reduce": statistics.median(
            t["backward with reduction"][0] - b for t, b in zip(clocks, last_pack, strict=True)
        ),
        "optimizer": statistics.median(t["step"][0] - t["ema"][0] for t in clocks),
        "ema": statistics.median(t["ema"][0] for t in clocks),
    }


def _values(engine: Engine, kind: str) -> list[Tensor]:
    """This rank's part of the weights or EMA of each tensor; not copies."""
    return [box.tensor for name, t in engine.boxes().items() if name.startswith(f"{kind}/") for box in t.boxes]


class _Clock:
    """Measures named parts that follow each other; on CUDA by events, without waiting between them."""

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, part: str) -> Generator[None]:
        began = self._now()
        yield
        self._marks.append((part, began, self._now()))

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def times(self) -> dict[str, list[float]]:
        """Seconds of each part, in order."""
        wait(self._device)
        found = defaultdict(list)
        for part, began, ended in self._marks:
            on_cuda = self._device.type == "cuda"
            found[part].append(began.elapsed_time(ended) / 1000 if on_cuda else ended - began)
        return found


def _count_syncs(trainer: Trainer, batch: StepBatch) -> int | None:
    """How often the host waits for the device in a step; torch warns of each time."""
    if trainer.world.device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _report(case: Case, batches: Sequence[StepBatch], ours: Sequence[Round]) -> dict[str, Any]:
    config, device = case.config, case.world.device
    seconds = statistics.median(r.seconds_a_step for r in ours)
    images, tokens = (statistics.mean(getattr(b, name) for b in batches) for name in ("step_images", "step_tokens"))
    lengths = [n for batch in batches for n in batch.step_lengths.tolist()]
    flops = 3 * sum(forward_flops(config.model, n) * count for n, count in Counter(lengths).items()) / len(batches)
    peak = config.tracking.peak_tflops or known_peak(device)
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "ranks": case.world.size,
        "layout": config.layout.model_dump(),
        "deterministic": config.deterministic,
        "steps": len(batches),
        "rounds": len(ours),
        "seconds_a_step": spread([r.seconds_a_step for r in ours]),
        "cpu_seconds_a_step": spread([r.cpu_seconds_a_step for r in ours]),
        "images_per_second": images / seconds,
        "tokens_per_second": tokens / seconds,
        "fill": sum(b.step_tokens for b in batches) / sum(b.step_capacity for b in batches),
        "flops_a_step": flops,
        "tflops_per_device": flops / seconds / case.world.size / 1e12,
        "peak_tflops": peak,
        "mfu": flops / seconds / case.world.size / 1e12 / peak if peak else None,
        "seconds_by_part": ours[-1].seconds_by_part,
        "syncs_in_a_step": ours[-1].syncs,
        "peak_bytes": max(r.peak_bytes or 0 for r in ours) if device.type == "cuda" else None,
        "planned_peak_bytes": _planned_peak(case, batches) if device.type == "cuda" else None,
    }


def _compare(
    report: dict[str, Any], ours: Sequence[Round], theirs: Sequence[Round], checkpointing: ReferenceCheckpointing
) -> dict[str, Any]:
    seconds, rounds = spread([r.seconds_a_step for r in theirs]), list(zip(theirs, ours, strict=True))
    images = report["images_per_second"] * report["seconds_a_step"]["median"]
    return {
        "checkpointing": checkpointing,
        "seconds_a_step": seconds,
        "cpu_seconds_a_step": spread([r.cpu_seconds_a_step for r in theirs]),
        "images_per_second": images / seconds["median"],
        "peak_bytes": theirs[-1].peak_bytes,
        "times_as_long": spread([t.seconds_a_step / o.seconds_a_step for t, o in rounds]),
        "times_the_cpu_seconds": spread([t.cpu_seconds_a_step / o.cpu_seconds_a_step for t, o in rounds]),
    }


def _planned_peak(case: Case, batches: Sequence[StepBatch]) -> int:
    packs, tokens = max(len(b.packs) for b in batches), max(len(b.packs[0].latents) for b in batches)
    compute = plan_compute(case.config, packs, tokens, on_cuda=True)
    return cuda_peak(case.config.model, case.layout, plan_state(case.config, case.layout), compute)
