"""Everything an attempt sets up before its first step, in the order in which it can go wrong cheaply."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

from data_sharding.cache import DiskCache
from data_sharding.errors import DataError, UserError
from data_sharding.frames import FrameReader
from data_sharding.patience import Patience
from data_sharding.plan import Plan
from data_sharding.stream import Loader
from fitv2_scale.audit import Audit
from fitv2_scale.checkpoint.begin import Source, begin_with
from fitv2_scale.checkpoint.checkpointer import Checkpointer, Restored
from fitv2_scale.checkpoint.policy import Cadence
from fitv2_scale.config import Config
from fitv2_scale.data import Data
from fitv2_scale.engines import make_engine
from fitv2_scale.evaluation import Evaluation
from fitv2_scale.ledger import RunLedger, ledger_of, read_pages
from fitv2_scale.model.counts import parameter_count
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.mesh import Layout
from fitv2_scale.parallel.world import World
from fitv2_scale.provenance import own_gpu, provenance
from fitv2_scale.relay import Relay
from fitv2_scale.run import Attempt, Run
from fitv2_scale.store import open_store
from fitv2_scale.totals import Times, Totals
from fitv2_scale.tracking.journal import Journal
from fitv2_scale.tracking.launch import Uploader
from fitv2_scale.tracking.target import why_journal_only

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """One attempt, on one rank. ``attempt``, ``journal`` and ``uploader`` are rank 0's alone, ``audit`` is those ranks'
    that read."""

    config: Config
    world: World
    layout: Layout
    relay: Relay
    data: Data
    run: Run
    number: int
    attempt: Attempt | None
    engine: Engine
    checkpoints: Checkpointer
    cadence: Cadence
    restored: Restored | None
    journal: Journal | None
    uploader: Uploader | None
    audit: Audit | None
    ledger: RunLedger
    evaluation: Evaluation
    times: Times
    totals: Totals  # of the run before this attempt
    notes: list[str]  # sentences for the user: what was passed over, what changes

    @property
    def start(self) -> int:
        """Steps done before this attempt."""
        return self.restored.step if self.restored else 0

    def headline(self) -> str:
        """What this attempt is about to do, and what it could not use."""
        begins = f"goes on at step {self.start}" if self.restored else "begins"
        ranks = f"{self.world.size} rank{'s' if self.world.size > 1 else ''} on {self.world.device.type}"
        shapes = " or ".join(str(shape.tokens) for shape in self.data.shapes)
        headline = f"{self.run.url}: attempt {self.number} {begins} with {ranks}, packs of {shapes} tokens"
        return "\n".join([*self.notes, headline])

    def open_loader(self) -> AbstractContextManager[Loader | None]:
        """None on ranks that do not read."""
        if not self.relay.reads:
            return nullcontext()
        data, config = self.data, self.config.data
        disk = DiskCache(config.cache_dir, int(config.cache_disk_gib * 2**30)) if config.cache_dir else None
        return Loader(
            data.plan,
            data.cost,
            data.shapes,
            self.layout.data_rank(self.world.rank),
            data.nodes,
            range(self.start, self.config.train.steps),
            int(config.cache_gib * 2**30),
            prefetch_bytes=int(config.prefetch_gib * 2**30),
            reader=FrameReader(Patience(deadline=config.deadline_seconds), disk),
            ledger=self.ledger.ledger,
        )

    def record(self, step: int, metrics: dict[str, float]) -> None:
        if self.journal:
            self.journal.metrics(step, metrics)
        if self.uploader:
            self.uploader.check()

    def evaluate(self, step: int, say: Callable[[str], None]) -> None:
        """Shows what is due after ``step`` steps (see Evaluation)."""
        with self.times.aside("evaluation"):
            self.checkpoints.staged()
            self.evaluation.run(step, say)

    def save(self, step: int, begin: bool, last: bool, totals: Callable[[], Totals]) -> str | None:
        """Learns what came of the save in flight, then begins that of the state after ``step`` steps if ``begin``; if
        ``last``, sees to it that this state is committed. Returns None, or why a save failed."""
        with self.times.aside("checkpoint"):
            return self._save(step, begin, last, totals)

    def _save(self, step: int, begin: bool, last: bool, totals: Callable[[], Totals]) -> str | None:
        failed = self._settle()
        if (begin or last) and self.checkpoints.newest != step and not self.checkpoints.gave_up:
            cursor = replace(self.data.plan.cursor(step), ledger=self.ledger.ledger.version)
            seal = self.journal.seal if self.journal else lambda: None
            self.checkpoints.begin(self.engine, step, cursor, seal, totals().accounting())
            self.cadence.saved(step)
            failed = (self._settle() if last else None) or failed
        return failed

    def note_pace(self, step_seconds: float) -> None:
        """On rank 0, once a save has shown how long it takes."""
        if self.attempt and self.checkpoints.seconds:
            self.attempt.note_pace(step_seconds, self.checkpoints.seconds)

    def _settle(self) -> str | None:
        step = self.checkpoints.newest
        failed = self.checkpoints.settle()
        if failed is not None:
            self.record(step, {"failed_saves": self.checkpoints.failed})
        return failed

    def staged(self) -> None:
        """From here on the optimizer may change the state (see Checkpointer)."""
        with self.times.aside("checkpoint"):
            self.checkpoints.staged()


@dataclass(frozen=True)
class Fork:
    """--fork-from RUN@STEP."""

    run: Run
    step: int

    @classmethod
    def parse(cls, text: str, child: str) -> "Fork":
        """``child`` is the URL of the new run. Once that has commits, the parent's may be gone. Raises UserError."""
        url, at, step = text.rpartition("@")
        if not at or not step.isdigit():
            raise UserError(f"--fork-from '{text}': give RUN@STEP, as in runs/first@1000")
        run = Run.open(url)
        steps = [entry.fields["step"] for entry in run.log.commits()]
        begun = open_store(child).exists("run.json") and Run.open(child).log.commits()
        if int(step) not in steps and not begun:
            raise UserError(f"--fork-from {text}: {url} has commits at {steps or 'no step'}, choose one of them")
        return cls(run, int(step))

    def parent(self) -> dict:
        return {"run": self.run.id, "url": self.run.url, "step": self.step}


def is_complete(config: Config) -> bool:
    """True if the run is there and has committed all of its steps already."""
    if not open_store(config.run).exists("run.json"):
        return False
    commits = Run.open(config.run).log.commits()
    return bool(commits) and commits[-1].fields["step"] >= config.train.steps


def claim(config: Config, plan: Plan, fork: Fork | None, world: World) -> tuple[Run, int]:
    """Makes or continues the run and begins an attempt, on all ranks. Raises UserError if the run is another one."""

    gpus = world.gather(own_gpu(world.device))

    def first() -> int:
        parent = fork.parent() if fork else None
        run = Run.open_or_create(config.run, config.model_dump(mode="json"), config.science(), plan.hash, parent)
        facts = {"parameters": parameter_count(config.model), "datasets": [m.digest for m in plan.manifests]}
        return run.claim(provenance() | facts | {"gpus": [gpu for gpu in gpus if gpu]}).number

    number = world.on_first(first)
    return Run.open(config.run), number


def open_session(
    config: Config, world: World, layout: Layout, data: Data, run: Run, number: int, fork: Fork | None
) -> Session:
    """Builds the engine, restores the newest whole commit, starts journal and uploader."""
    times = Times()
    engine, relay = make_engine(config, layout, world), Relay(layout, world.rank)
    attempt = Attempt(number, run) if world.is_first else None
    checkpoints = Checkpointer(run, attempt, number, world, config.checkpoint)
    restored, data, notes, forked = _restore(checkpoints, engine, run, data, fork, config, world)
    if attempt and attempt.changed:
        notes = [*notes, f"since attempt {number - 1}: {'; '.join(attempt.changed)}"]
        log.warning("%s", notes[-1])
    ledger = _open_ledger(run, number, data, restored, fork, config, world)
    checkpoints.prepare(engine)
    folder = run.local(f"attempts/{number}")
    journal = Journal(folder, number, restored.step if restored else 0, attempt.ship) if world.is_first else None
    evaluation = Evaluation.open(config, world, layout, data, engine, journal, run.store)
    uploader = _start_uploader(run, config, notes) if world.is_first else None
    audit = None
    if config.train.audit and relay.reads:
        audit = Audit(folder / "audit", layout.data_rank(world.rank), config.flow, config.seed)
    return Session(
        config=config,
        world=world,
        layout=layout,
        relay=relay,
        data=data,
        run=run,
        number=number,
        attempt=attempt,
        engine=engine,
        checkpoints=checkpoints,
        cadence=Cadence(config.checkpoint, restored.step if restored else 0, world.share),
        restored=restored,
        journal=journal,
        uploader=uploader,
        audit=audit,
        ledger=ledger,
        evaluation=evaluation,
        times=times,
        totals=Totals.of(restored.accounting, forked) if restored else Totals(),
        notes=notes,
    )


def _start_uploader(run: Run, config: Config, notes: list[str]) -> Uploader | None:
    if config.tracking.uri == "none":
        return None
    if (why := why_journal_only(run.url, config.tracking.uri)) is not None:
        notes.append(why)
        return None
    return Uploader(run.url, config.tracking.uri, config.tracking.experiment)


def _open_ledger(
    run: Run, number: int, data: Data, restored: Restored | None, fork: Fork | None, config: Config, world: World
) -> RunLedger:
    """The ledger as the attempts before have left it. A fork begins one of its own."""
    ledger = ledger_of(world.on_first(lambda: read_pages(run.store)), data.plan.manifests)
    if restored and restored.cursor and restored.cursor.ledger > ledger.version and fork is None:
        raise DataError(
            f"{run.url}/ledger has {ledger.version} pages, but the commit at step {restored.step} was made with "
            f"{restored.cursor.ledger}: restore the folder"
        )
    return RunLedger(run.store, run.log, number, config.seed, config.data.max_substituted, ledger)


def _restore(
    checkpoints: Checkpointer, engine: Engine, run: Run, data: Data, fork: Fork | None, config: Config, world: World
) -> tuple[Restored | None, Data, list[str], bool]:
    """The newest whole commit, the data as it goes on from there, what there is to say, and whether the commit is
    another run's."""
    restored = checkpoints.restore(engine, run)
    forked = restored is None and fork is not None
    if forked:
        restored = checkpoints.restore(engine, fork.run, fork.step)
    if restored is None:
        if config.init_from:
            begin_with(Source.parse(config.init_from), engine, config.model, world)
            return None, data, [f"begins with the weights of {config.init_from}"], False
        return None, data, [], False
    # A fork may have other data; it then begins its own plan at the step where it branches off.
    if restored.cursor is None or (forked and restored.cursor.plan_hash != data.plan.hash):
        return restored, data, restored.quarantined, forked
    data, notes = data.continued(restored.cursor, restored.step, config)
    return restored, data, [*restored.quarantined, *notes], forked


@contextmanager
def log_to(run: Run, number: int, rank: int) -> Iterator[None]:
    """Appends this rank's log records, tracebacks included, to a file of its own. To a run that is elsewhere it goes at
    the end, with all else that rank 0's node has of the attempt."""
    folder = f"attempts/{number}"
    file = f"{folder}/logs/rank-{rank:05d}.log"
    run.local(file).parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(run.local(file), delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        try:
            handler.close()
            run.ship(folder if rank == 0 else file)
        except (OSError, UserError) as error:
            log.warning("%s stays on its node: %s", run.local(folder), error)
