"""Everything an attempt sets up before its first step, in the order in which it can go wrong cheaply."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_sharding.codec import Codec, get_codec
from data_sharding.deal import Cost, Shape, choose_shape
from data_sharding.errors import UserError
from data_sharding.manifest import Manifest
from data_sharding.plan import Plan
from data_sharding.stream import Loader
from fitv2_scale.audit import Audit
from fitv2_scale.checkpoint.checkpointer import Checkpointer, Restored
from fitv2_scale.config import Config
from fitv2_scale.engines import make_engine
from fitv2_scale.evaluate.pictures import decode, grid_png, grid_requests
from fitv2_scale.evaluate.sampler import sample
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.mesh import Layout
from fitv2_scale.parallel.world import World
from fitv2_scale.run import Attempt, Run, provenance
from fitv2_scale.tracking.journal import Journal
from fitv2_scale.tracking.uploader import start_uploader


@dataclass(frozen=True)
class Data:
    """What is trained on, and how it is dealt out in this attempt."""

    plan: Plan
    cost: Cost
    shape: Shape
    codec: Codec

    @classmethod
    def open(cls, config: Config, ranks: int) -> "Data":
        """Raises UserError if there is no such dataset, or it does not fit the model, the batch or the ranks."""
        manifest = Manifest.load(config.data.url)
        if len(manifest.classes) > config.model.classes:
            raise UserError(
                f"{config.data.url} has {len(manifest.classes)} classes, the model only {config.model.classes}: "
                f"set model.classes={len(manifest.classes)} or more"
            )
        plan = Plan(manifest, config.seed, config.batch.images, config.data.views)
        # A block's multiply-adds on an image of l tokens, 12 d^2 l + 2 d l^2, divided by 2 d.
        cost = Cost(linear=6 * config.model.hidden, quadratic=1)
        window = [plan.step(step).tokens for step in range(plan.window_steps)]
        shape = choose_shape(window, cost, ranks, config.layout.max_tokens, plan.max_seqlen)
        return cls(plan, cost, shape, get_codec(manifest.header.codec["name"]))


@dataclass(frozen=True)
class Session:
    """One attempt, on one rank. ``attempt`` and ``journal`` are rank 0's alone."""

    config: Config
    world: World
    data: Data
    run: Run
    number: int
    attempt: Attempt | None
    engine: Engine
    checkpoints: Checkpointer
    restored: Restored | None
    journal: Journal | None
    audit: Audit | None

    @property
    def start(self) -> int:
        """Steps done before this attempt."""
        return self.restored.step if self.restored else 0

    def headline(self) -> str:
        """What this attempt is about to do, and what it could not use."""
        begins = f"goes on at step {self.start}" if self.restored else "begins"
        ranks = f"{self.world.size} rank{'s' if self.world.size > 1 else ''} on {self.world.device.type}"
        shape = f"packs of {self.data.shape.tokens} tokens"
        notes = self.restored.quarantined if self.restored else []
        return "\n".join([*notes, f"{self.run.url}: attempt {self.number} {begins} with {ranks}, {shape}"])

    def open_loader(self) -> Loader:
        data, world = self.data, self.world
        cache_bytes = int(self.config.data.cache_gib * 2**30)
        steps = range(self.start, self.config.train.steps)
        return Loader(data.plan, data.cost, data.shape, world.rank, world.size, steps, cache_bytes)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        if self.journal:
            self.journal.metrics(step, metrics)

    def record_picture(self, step: int) -> None:
        """Samples the configured grid from the EMA weights, all ranks together, into samples/<step>.png."""
        config = self.config
        requests = grid_requests(config.sampling.sizes, config.sampling.columns, len(self.data.plan.manifest.classes))
        with self.engine.ema_weights():
            made = sample(
                self.engine.network,
                requests,
                classes=config.model.classes,
                cfg=config.sampling.cfg,
                steps=config.sampling.steps,
                seed=config.seed,
                world=self.world,
            )
        if self.journal:
            path = f"samples/{step:08d}.png"
            pictures = [decode(made[r.index], self.data.codec) for r in requests]
            self.run.store.put(path, grid_png(pictures, rows=len(config.sampling.sizes)))
            self.journal.picture(step, path)

    def commit(self, step: int) -> None:
        if self.journal:
            self.journal.seal()
        self.checkpoints.save(self.engine, step, self.data.plan.cursor(step))


@dataclass(frozen=True)
class Fork:
    """--fork-from RUN@STEP."""

    run: Run
    step: int

    @classmethod
    def parse(cls, text: str) -> "Fork":
        url, at, step = text.rpartition("@")
        if not at or not step.isdigit():
            raise UserError(f"--fork-from '{text}': give RUN@STEP, as in runs/first@1000")
        run = Run.open(url)
        steps = [entry.fields["step"] for entry in run.log.commits()]
        if int(step) not in steps:
            raise UserError(f"--fork-from {text}: {url} has commits at {steps or 'no step'}, choose one of them")
        return cls(run, int(step))

    def parent(self) -> dict:
        return {"run": self.run.id, "url": self.run.url, "step": self.step}


def is_complete(config: Config) -> bool:
    """True if the run is there and has committed all of its steps already."""
    if not (Path(config.run) / "run.json").is_file():
        return False
    commits = Run.open(config.run).log.commits()
    return bool(commits) and commits[-1].fields["step"] >= config.train.steps


def claim(config: Config, plan: Plan, fork: Fork | None, world: World) -> tuple[Run, int]:
    """Makes or continues the run and begins an attempt, on all ranks. Raises UserError if the run is another one."""

    def first() -> int:
        parent = fork.parent() if fork else None
        run = Run.open_or_create(config.run, config.model_dump(mode="json"), config.science(), plan.hash, parent)
        return run.claim(provenance()).number

    number = world.on_first(first)
    return Run.open(config.run), number


def open_session(config: Config, world: World, data: Data, run: Run, number: int, fork: Fork | None) -> Session:
    """Builds the engine, restores the newest whole commit, starts journal and uploader."""
    engine = make_engine(config, Layout.of(world.size, config.layout.replicate), world)
    attempt = Attempt(number, run) if world.is_first else None
    checkpoints = Checkpointer(run, attempt, number, world, config.checkpoint.keep_last)
    restored = _restore(checkpoints, engine, run, data.plan, fork)
    folder = Path(run.store.path(f"attempts/{number}"))
    journal = Journal(folder, number, restored.step if restored else 0) if world.is_first else None
    if world.is_first and config.tracking.uri != "none":
        start_uploader(run.url, config.tracking.uri, config.tracking.experiment)
    audit = Audit(folder / "audit", world.rank, config.flow, config.seed) if config.train.audit else None
    return Session(config, world, data, run, number, attempt, engine, checkpoints, restored, journal, audit)


def _restore(checkpoints: Checkpointer, engine: Engine, run: Run, plan: Plan, fork: Fork | None) -> Restored | None:
    restored = checkpoints.restore(engine, run)
    if restored and restored.cursor and restored.cursor.plan_hash != plan.hash:
        raise UserError(
            f"{run.url} was trained on other data or in another order: restore data.url, or branch off with --fork-from"
        )
    if restored is None and fork is not None:
        restored = checkpoints.restore(engine, fork.run, fork.step)
    return restored


@contextmanager
def log_to(folder: Path, rank: int) -> Iterator[None]:
    """Appends this rank's log records, tracebacks included, to a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank-{rank:05d}.log", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
