"""Everything an attempt sets up before its first step, in the order in which it can go wrong cheaply."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from data_sharding.errors import DataError, UserError
from data_sharding.plan.plan import Plan
from data_sharding.storage.open_store import open_store
from fitv2_scale.checkpoint.checkpointer import Checkpointer, Restored
from fitv2_scale.checkpoint.init_from import Source, begin_with
from fitv2_scale.checkpoint.policy import Cadence
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from fitv2_scale.model.counts import parameter_count
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.world import World
from fitv2_scale.run.fork import Fork
from fitv2_scale.run.provenance import own_gpu, provenance
from fitv2_scale.run.run import Attempt, Run
from fitv2_scale.run.substitutions import SubstitutionLog, substitutes_of, substitution_records
from fitv2_scale.tracking.destination import journal_only_reason
from fitv2_scale.tracking.journal import Journal
from fitv2_scale.tracking.uploader_process import Uploader
from fitv2_scale.train.batch_audit import Audit
from fitv2_scale.train.batch_broadcast import Relay
from fitv2_scale.train.in_loop_eval import Evaluation
from fitv2_scale.train.metrics.accounting import Times, Totals
from fitv2_scale.train.session import Session

log = logging.getLogger(__name__)


def is_complete(config: Config) -> bool:
    """True if the run is there and has committed all of its steps already."""
    if not open_store(config.run).exists("run.json"):
        return False
    commits = Run.open(config.run).log.commits()
    return bool(commits) and commits[-1].fields["step"] >= config.train.steps


def claim(config: Config, plan: Plan, fork: Fork | None, world: World) -> tuple[Run, int]:
    """Makes or continues the run and begins an attempt, on all ranks. Raises UserError if the run is another one."""

    gpus = world.all_gather(own_gpu(world.device))

    def first() -> int:
        parent = fork.parent() if fork else None
        run = Run.open_or_create(config.run, config.model_dump(mode="json"), config.recipe(), plan.hash, parent)
        facts = {"parameters": parameter_count(config.model), "datasets": [m.digest for m in plan.manifests]}
        return run.claim(provenance() | facts | {"gpus": [gpu for gpu in gpus if gpu]}).number

    number = world.run_on_rank0(first)
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
    substitutions = _open_substitutions(run, number, data, restored, fork, config, world)
    checkpoints.prepare(engine)
    folder = run.local_path(f"attempts/{number}")
    journal = Journal(folder, number, restored.step if restored else 0, attempt.upload) if world.is_first else None
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
        cadence=Cadence(config.checkpoint, restored.step if restored else 0, world.broadcast),
        restored=restored,
        journal=journal,
        uploader=uploader,
        audit=audit,
        substitutions=substitutions,
        evaluation=evaluation,
        times=times,
        totals=Totals.of(restored.accounting, forked) if restored else Totals(),
        notes=notes,
    )


def _start_uploader(run: Run, config: Config, notes: list[str]) -> Uploader | None:
    if config.tracking.uri == "none":
        return None
    if (why := journal_only_reason(run.url, config.tracking.uri)) is not None:
        notes.append(why)
        return None
    return Uploader(run.url, config.tracking.uri, config.tracking.experiment)


def _open_substitutions(
    run: Run, number: int, data: Data, restored: Restored | None, fork: Fork | None, config: Config, world: World
) -> SubstitutionLog:
    """The substitutes that earlier attempts recorded. A fork starts records of its own."""
    records = substitution_records(run.store)
    substitutes = substitutes_of(world.run_on_rank0(records.entries), data.plan.manifests)
    if restored and restored.cursor and restored.cursor.ledger > substitutes.version and fork is None:
        raise DataError(
            f"{run.url}/ledger holds {substitutes.version} records of substituted images, but the commit at step "
            f"{restored.step} was made with {restored.cursor.ledger}: restore the folder"
        )
    return SubstitutionLog(records, run.log, number, config.seed, config.data.max_substituted, substitutes)


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
    run.local_path(file).parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(run.local_path(file), delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        try:
            handler.close()
            run.upload(folder if rank == 0 else file)
        except (OSError, UserError) as error:
            log.warning("%s stays on its node: %s", run.local_path(folder), error)
