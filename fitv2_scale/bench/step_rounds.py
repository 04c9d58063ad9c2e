"""A round of training steps, of a trainer that is built for it: what `fitv2 bench step` measures again and again."""

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from data_sharding.stream.batch import StepBatch
from fitv2_scale.bench.step_data import open_steps
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from fitv2_scale.model.objective import Objective
from fitv2_scale.model.objectives import make_objective
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.world import World
from fitv2_scale.train.step import train_step


@dataclass(frozen=True)
class Case:
    """The workload: the first ``steps`` steps of a run."""

    config: Config
    world: World
    layout: Layout
    data: Data
    steps: int

    def open(self) -> AbstractContextManager[Iterator[StepBatch]]:
        return open_steps(self.config, self.data, self.layout.data_rank(self.world.rank), self.steps)


@dataclass(frozen=True)
class Round:
    """The figures of one trainer, newly built."""

    seconds_a_step: float
    cpu_seconds_a_step: float  # of all threads of this process
    peak_bytes: int | None  # on CUDA
    seconds_by_part: dict[str, float] | None = None
    syncs: int | None = None  # times that the host waits for the device in one step, on CUDA


@dataclass(frozen=True)
class Trainer:
    """Takes steps as a run does, and saves nothing."""

    config: Config
    world: World
    engine: Engine
    objective: Objective

    def step(self, batch: StepBatch) -> None:
        train_step(self.engine, batch, self.objective, self.config, self.world.device)


def free(device: torch.device) -> None:
    """Frees the memory of the round before, which would count in the peak of the next one."""
    gc.collect()  # the hooks of FSDP hold a network in reference cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_steps(step: Callable, stream: Iterable[StepBatch], batches: Sequence[StepBatch], world: World) -> Round:
    """Steps over ``stream``, after a warm-up step of each shape in ``batches``, which compiles and fills caches."""
    on_cuda = world.device.type == "cuda"
    for batch in {(len(b.packs), len(b.packs[0].latents)): b for b in batches}.values():
        step(batch)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    wait(world.device)
    began, worked = time.perf_counter(), time.process_time()
    for batch in stream:
        step(batch)
    wait(world.device)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    peak = torch.cuda.max_memory_allocated() if on_cuda else None
    return Round(seconds / len(batches), cpu_seconds / len(batches), peak)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def our_round(case: Case, batches: Sequence[StepBatch]) -> tuple[Trainer, Round]:
    """The figures of a new trainer on ``batches``, the steps of ``case``; and the trainer, which is still there."""
    config, world = case.config, case.world
    trainer = Trainer(config, world, make_engine(config, case.layout, world), make_objective(config, world.device))
    with case.open() as stream:
        return trainer, measure_steps(trainer.step, stream, batches, case.world)
