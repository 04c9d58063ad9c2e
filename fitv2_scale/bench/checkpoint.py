"""Measures checkpoints on this machine: the time that training waits for a save, the time until it is durable, loads.

Each figure is measured together with what it is compared with, in the same run: a background save with a blocking one,
a blocking save with plain sequential writes of the same bytes, a load on another layout with one on the same layout.
Everything written to the storage is deleted, at the start and at the end.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from data_sharding.errors import UserError
from data_sharding.storage.filesystems import file_system
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.open_store import open_store
from data_sharding.storage.store import Store
from data_sharding.stream.batch import StepBatch
from fitv2_scale.bench.latents import drop_from_page_cache
from fitv2_scale.bench.reshard import reshard_commit
from fitv2_scale.bench.spread import spread
from fitv2_scale.bench.step_data import open_steps
from fitv2_scale.checkpoint.checkpointer import Checkpointer
from fitv2_scale.checkpoint.commit import read_manifest
from fitv2_scale.checkpoint.restore import restore
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from fitv2_scale.model.objective import Objective
from fitv2_scale.model.objectives import make_objective
from fitv2_scale.parallel.agreement import agree, read_alike
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.rank_facts import config_facts, read_data, software_facts
from fitv2_scale.parallel.world import World, join
from fitv2_scale.run.log import LogEntry
from fitv2_scale.run.run import Attempt, Run
from fitv2_scale.train.step import train_step

_FOLDER = "fitv2-bench-checkpoint"  # below the user's folder or prefix; everything is written to it, and deleted
_BATCHES = 4  # different batches to train on, in turn
_PIECE = 16 << 20  # bytes per call of a plain write


def measure(config: Config, saves: int, where: str | None) -> dict[str, Any] | None:
    """All figures, on rank 0; None elsewhere. ``where``: an s3:// URL or a folder; None: a temporary one.

    Each of the ``saves`` rounds has a background save while training, blocking saves, plain writes, and loads.
    """
    with ExitStack() as stack:
        world = stack.enter_context(join())
        agree(world, config_facts(config) | software_facts(world.device) | {"saves": saves, "where": where})
        store = stack.enter_context(_place(world, where))
        layout, data = read_alike(world, lambda: read_data(config, world))
        with open_steps(config, data, layout.data_rank(world.rank), _BATCHES) as stream:
            batches = cycle(list(stream))
        bench = _Bench.open(config, world, make_engine(config, layout, world), data, store, batches)
        for _ in range(2):
            bench.step(next(batches))
        first = bench.save_while_training()
        rounds = [bench.round() for _ in range(saves)]
        return _report(bench, layout, first, rounds) if world.is_first else None


@contextmanager
def _place(world: World, where: str | None) -> Generator[Store]:
    """The storage to write to, empty before and afterwards."""
    with ExitStack() as stack:
        if where is None and world.is_first:
            where = stack.enter_context(tempfile.TemporaryDirectory())
        store = open_store(f"{world.broadcast(where).rstrip('/')}/{_FOLDER}")

        def clear() -> None:
            for part in ("run", "resharded", "plain"):
                store.delete_tree(part)

        world.run_on_rank0(clear)
        try:
            yield store
        finally:
            if world.is_first:
                clear()


@dataclass(frozen=True)
class _Save:
    """One background save while training; the longest times of all ranks."""

    stall: float  # seconds for which the training thread waited
    durable: float  # seconds from its start to its COMMIT
    steps: list[float]  # seconds of each step until all ranks had finished the save


@dataclass(frozen=True)
class _Round:
    plain: float  # seconds, as all below
    blocking: float
    background: _Save
    step: float  # without a save
    load: float
    load_resharded: float
    cached: float  # the same two loads from the page cache, since the times of a disk vary
    cached_resharded: float


@dataclass
class _Bench:
    """A run that is trained, saved and loaded, and what is measured of it. All ranks do all of this together."""

    config: Config
    world: World
    engine: Engine
    objective: Objective
    data: Data
    store: Store
    batches: Iterator[StepBatch]
    run: Run
    checkpoints: Checkpointer
    retire: Callable[[], None]
    prepare_seconds: float
    saved: int = 0
    waited: float = field(default=0.0)

    @classmethod
    def open(
        cls, config: Config, world: World, engine: Engine, data: Data, store: Store, batches: Iterator[StepBatch]
    ) -> "_Bench":
        run = _make_run(world, f"{store.url}/run")
        attempt = Attempt(world.run_on_rank0(lambda: run.claim({}).number), run)
        began = time.perf_counter()
        checkpoints = Checkpointer(engine, attempt, world, config.checkpoint)
        prepared = max(world.all_gather(time.perf_counter() - began))

        def retire() -> None:
            for entry in run.log.commits():
                attempt.retire(entry.n)
                run.store.delete_tree(entry.fields["path"])

        objective = make_objective(config, world.device)
        return cls(config, world, engine, objective, data, store, batches, run, checkpoints, retire, prepared)

    def step(self, batch: StepBatch) -> float:
        """Trains on the batch and returns the seconds that this took."""
        began = time.perf_counter()
        train_step(self.engine, batch, self.objective, self.config, self.world.device, self._wait_for_staging)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def _wait_for_staging(self) -> None:
        began = time.perf_counter()
        self.checkpoints.wait_for_staging()
        self.waited += time.perf_counter() - began

    def round(self) -> _Round:
        background = self.save_while_training()
        step = statistics.median(self.step(next(self.batches)) for _ in range(3))
        entry, resharded = self._newest(), _make_run(self.world, f"{self.store.url}/resharded")
        self.world.run_on_rank0(lambda: reshard_commit(self.run, entry, resharded, self.world.size + 1))
        # Each pair in both orders, since earlier writes slow a disk down for later ones.
        size = self._own_bytes()
        writes = [self._save_blocking(), self._plain_writes(size), self._plain_writes(size), self._save_blocking()]
        for run in (self.run, resharded):
            self._load(run)  # afterwards the disk's own cache holds both
        order = (self.run, resharded, resharded, self.run)
        loads, cached = [self._load(run) for run in order], [self._load(run, cached=True) for run in order]
        self.world.run_on_rank0(lambda: self.store.delete_tree("resharded"))
        (blocking, plain), *pairs = map(_outer_and_inner, (writes, loads, cached))
        return _Round(plain, blocking, background, step, *pairs[0], *pairs[1])

    def save_while_training(self) -> _Save:
        """Starts a save and trains until all ranks have finished it."""
        self._make_room()
        began, clock, self.waited, steps = time.perf_counter(), time.time(), 0.0, []
        self.checkpoints.start_save(self.saved, self.data.plan.cursor(0))
        stall = time.perf_counter() - began
        ended = False
        while not ended:
            steps.append(self.step(next(self.batches)))
            ended = self.world.all_reduce_sum(torch.tensor(int(self.checkpoints.save_ended))).item() == self.world.size
        began = time.perf_counter()
        _check(self.checkpoints.finish_save())
        stall += self.waited + time.perf_counter() - began
        committed = datetime.fromisoformat(self._newest().time).timestamp()
        return _Save(self._longest(stall), self._longest(committed - clock), steps)

    def _save_blocking(self) -> float:
        self._make_room()
        began = time.perf_counter()
        _check(self.checkpoints.save(self.saved, self.data.plan.cursor(0)))
        return self._longest(time.perf_counter() - began)

    def _make_room(self) -> None:
        """Deletes the previous saves, and waits for all ranks."""
        self.world.run_on_rank0(self.retire)
        self.saved += 1

    def _own_bytes(self) -> int:
        """The bytes that this rank saves."""
        manifest = self.world.run_on_rank0(lambda: read_manifest(self.run, self._newest()))
        return manifest["files"].get(f"rank-{self.world.rank:05d}.safetensors", {"bytes": 0})["bytes"]

    def _plain_writes(self, size: int) -> float:
        """Seconds for each process to write ``size`` bytes to a file of its own, durably; the longest of all."""
        piece = torch.randn(_PIECE // 4).numpy().data.cast("B")
        path, on_disk = f"{self.store.url}/plain/{self.world.rank}", isinstance(self.store, LocalStore)
        if on_disk:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            opened = partial(open, path, "wb", 0)
        else:
            bucket, path = file_system(path)
            opened = partial(bucket.open, path, "wb")
        self.world.run_on_rank0(self.retire)  # as before a save, so that the disk has the same free space
        began = time.perf_counter()
        with opened() as file:
            for at in range(0, size, _PIECE):
                # fsspec, which has no annotation here, would give a text file in another mode.
                file.write(piece[: size - at])  # pyrefly: ignore[bad-argument-type]
            if on_disk:
                os.fsync(file.fileno())
        seconds = self._longest(time.perf_counter() - began)
        self.world.run_on_rank0(lambda: self.store.delete_tree("plain"))
        return seconds

    def _load(self, run: Run, cached: bool = False) -> float:
        """Seconds of a load; from a disk, not from the page cache, unless ``cached``."""
        if isinstance(self.store, LocalStore) and not cached:
            self.world.run_on_rank0(lambda: drop_from_page_cache(Path(run.url)))
        began = time.perf_counter()
        restored = restore(self.engine, run, self.world)
        seconds = self._longest(time.perf_counter() - began)
        assert restored is not None and not restored.quarantined
        return seconds

    def _newest(self) -> LogEntry:
        return self.run.log.commits()[-1]

    def _longest(self, seconds: float) -> float:
        return max(self.world.all_gather(seconds))


def _check(failure: str | None) -> None:
    if failure is not None:
        raise UserError(f"saving failed: {failure}")


def _outer_and_inner(seconds: Sequence[float]) -> tuple[float, float]:
    """The mean of the first and the last of four, and the mean of the two between."""
    first, *inner, last = seconds
    return statistics.mean((first, last)), statistics.mean(inner)


def _make_run(world: World, url: str) -> Run:
    world.run_on_rank0(lambda: Run.open_or_create(url, {}, {}, None) and None)
    return Run.open(url)


def _report(bench: _Bench, layout: Layout, first: _Save, rounds: Sequence[_Round]) -> dict[str, Any]:
    manifest = read_manifest(bench.run, bench._newest())
    size = sum(file["bytes"] for file in manifest["files"].values())
    blocking = statistics.median(r.blocking for r in rounds)
    stalls = [r.background.stall for r in rounds]
    device = bench.world.device
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "ranks": bench.world.size,
        "layout": bench.config.layout.model_dump(),
        "data_parallel": layout.data_parallel,
        "storage": "s3" if bench.store.url.startswith("s3://") else "local",
        "bytes": size,
        "rounds": len(rounds),
        "prepare_seconds": bench.prepare_seconds,
        "stall_seconds": {"first": first.stall, **spread(stalls)},
        "blocking_seconds": spread([r.blocking for r in rounds]),
        "stall_share": spread([stall / blocking for stall in stalls]),
        "durable_seconds": spread([r.background.durable for r in rounds]),
        "step_seconds": spread([r.step for r in rounds]),
        "step_seconds_while_saving": spread([s for r in rounds for s in r.background.steps]),
        "megabytes_per_second": spread([size / r.blocking / 1e6 for r in rounds]),
        "plain_megabytes_per_second": spread([size / r.plain / 1e6 for r in rounds]),
        "share_of_plain": spread([r.plain / r.blocking for r in rounds]),
        "share_of_plain_while_training": spread([r.plain / r.background.durable for r in rounds]),
        "load_megabytes_per_second": spread([size / r.load / 1e6 for r in rounds]),
        "load_other_layout_times_as_long": spread([r.load_resharded / r.load for r in rounds]),
        "cached_load_megabytes_per_second": spread([size / r.cached / 1e6 for r in rounds]),
        "cached_load_other_layout_times_as_long": spread([r.cached_resharded / r.cached for r in rounds]),
    }
