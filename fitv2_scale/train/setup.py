"""Everything an attempt sets up before its first step; what is cheap to check comes first."""

import logging
import secrets
from typing import Any

import torch

from data_sharding.errors import DataError, UserError
from data_sharding.format.manifest import read_header
from data_sharding.plan.plan import Plan
from data_sharding.plan.size_presets import is_preset
from data_sharding.storage.open_store import open_store
from fitv2_scale.checkpoint.checkpointer import Checkpointer
from fitv2_scale.checkpoint.init_from import load_initial_weights
from fitv2_scale.checkpoint.policy import SaveSchedule
from fitv2_scale.checkpoint.restore import Restored, has_committed, restore
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from fitv2_scale.evaluate.validation import held_out_urls
from fitv2_scale.identity import check_finished, check_start, open_run
from fitv2_scale.model.counts import new_names, parameter_count
from fitv2_scale.model.objectives import make_objective
from fitv2_scale.parallel.agreement import Facts, read_alike, require_shared
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.gpu_kernels import kernel_notes, require_kernels
from fitv2_scale.parallel.rank_facts import config_facts, software_facts
from fitv2_scale.parallel.world import World
from fitv2_scale.run.fork import Fork
from fitv2_scale.run.paths import absolute_paths
from fitv2_scale.run.provenance import own_gpu, provenance
from fitv2_scale.run.run import Attempt, Run
from fitv2_scale.run.substitutions import SubstitutionLog, substitutes_of, substitution_records
from fitv2_scale.run.weights_source import WeightsSource
from fitv2_scale.tracking.destination import journal_only_reason, notes_at_start
from fitv2_scale.tracking.journal import Journal
from fitv2_scale.tracking.uploader_process import Uploader
from fitv2_scale.train.batch_audit import Audit, BatchAudit, NullAudit
from fitv2_scale.train.batch_broadcast import BatchBroadcast
from fitv2_scale.train.in_loop_eval import InLoopEvaluation
from fitv2_scale.train.metrics.accounting import Accounting, AttemptClock
from fitv2_scale.train.recorder import NullRecorder, RankZeroRecorder, Recorder
from fitv2_scale.train.session import Session

log = logging.getLogger(__name__)


def read_request(config: Config, fork_from: str | None, device: torch.device) -> tuple[Fork | None, Facts]:
    """What a rank was asked to train, on ``device``, and the facts in which all ranks must agree. Raises UserError."""
    if not config.run:
        raise UserError("give the run's folder as run=FOLDER")
    if presets := [url for url in config.data.urls if is_preset(url)]:
        raise UserError(f"{presets[0]} has sizes only, for `fitv2 plan`: give a dataset as data.url to train")
    require_kernels(config.layout, device)
    fork = Fork.parse(fork_from, config.run) if fork_from else None
    facts = {"command": "train", "--fork-from": fork_from, "run of --fork-from": fork and fork.run.id}
    return fork, facts | config_facts(config) | software_facts(device)


def is_complete(config: Config, fork: Fork | None, world: World) -> bool:
    """Whether the run exists and has committed all of its steps, in a commit that is whole. A collective. Raises
    UserError if it has, and is another run than that of ``config`` and ``fork``."""
    steps = config.train.steps

    def claims_to_be() -> bool:
        if not open_store(config.run).exists("run.json"):
            return False
        done = any(entry.fields["step"] >= steps for entry in Run.open(config.run).log.commits())
        if done:
            check_finished(config, fork.parent() if fork else None)
        return done

    return world.run_on_rank0(claims_to_be) and has_committed(Run.open(config.run), steps, world)


def claim(config: Config, plan: Plan, fork: Fork | None, world: World) -> Attempt:
    """Makes or continues the run and starts an attempt, on all ranks. Raises UserError if the run is another one, or
    not in a place that all ranks share: a rank that sees a copy would save its part of each commit there."""
    gpus = world.all_gather(own_gpu(world.device))

    def claim_on_rank0() -> tuple[int, str]:
        new = new_names(config.model, config.init_new)
        check_start(config, plan, fork)
        run = open_run(config, plan, fork.parent() if fork else None)
        facts = _facts(config, plan) | {"gpus": [gpu for gpu in gpus if gpu]}
        if config.init_from and not fork:
            facts |= _initial_weights(config, run, begins=not run.log.commits()) | ({"init_new": new} if new else {})
        nonce = secrets.token_hex(8)
        return run.claim(provenance() | facts | {"nonce": nonce}).number, nonce

    number, nonce = world.run_on_rank0(claim_on_rank0)
    start = f"attempts/{number}/start.json"
    require_shared(world, config.run, lambda: (open_store(config.run).read_json(start) or {}).get("nonce") == nonce)

    def open_here() -> tuple[Run, Facts]:
        run = Run.open(config.run)
        return run, {"id of the run": run.id}

    return Attempt(number, read_alike(world, open_here))


def _facts(config: Config, plan: Plan) -> dict[str, Any]:
    """What start.json records of the network and the data: digests, by which others find out that these are the same.
    Also where metrics are published, since a later attempt may publish elsewhere. Raises UserError if the data of
    validation do not exist."""
    facts: dict[str, Any] = {
        "parameters": parameter_count(config.model),
        "datasets": [m.digest for m in plan.manifests],
        "codec": plan.manifests[0].header.codec["digest"],
        "tracking": absolute_paths({"uri": config.tracking.uri, "experiment": config.tracking.experiment}),
    }
    if config.validation.every_steps:
        facts["validation"] = [read_header(url)[1] for url in held_out_urls(plan.manifests, config.validation)]
        facts["validation_grid"] = {"images": config.validation.images, "timesteps": config.validation.timesteps}
    return facts


def _initial_weights(config: Config, run: Run, begins: bool) -> dict[str, str]:
    """The digest of the weights of init_from, for start.json. A run of an earlier version, which recorded none, adopts
    that of the weights that are there now. ``begins``: the run needs them; from its first commit on it does not, and
    they may be gone.

    Raises UserError if they are needed and are others than those it began with: the run would be another one. (While
    they are loaded, the ranks compare what they read.)
    """
    known = run.recorded("init_from")
    if known and not begins:
        return {"init_from": known}
    try:
        digest = WeightsSource.parse(config.init_from).digest()
    except UserError:
        if begins:
            raise
        return {}
    if known not in (None, digest):
        raise UserError(
            f"{config.init_from} no longer holds the weights that {run.url} began with: restore them, or give a new "
            "run folder"
        )
    return {"init_from": digest}


def open_session(
    config: Config, world: World, layout: Layout, data: Data, attempt: Attempt, fork: Fork | None
) -> Session:
    """Builds the engine, restores the newest intact commit, starts journal and uploader."""
    clock = AttemptClock()
    engine, batch_broadcast = make_engine(config, layout, world), BatchBroadcast(layout, world.rank)
    restored, data, notes, forked = _restore(engine, attempt.run, data, fork, config, world)
    start = restored.step if restored else 0
    about = [*kernel_notes(config.layout, world.device), *data.notes(config), *_changes(attempt)]
    for note in about if world.is_first else []:
        notes = [*notes, note]
        log.warning("%s", note)
    substitutions = _open_substitutions(attempt, data, restored, fork, config, world)
    checkpoints = Checkpointer(engine, attempt, world, config.checkpoint, newest=start)
    evaluation = InLoopEvaluation(config, world, layout, data, engine)
    recorder: Recorder = _rank_zero_recorder(attempt, start, config, notes) if world.is_first else NullRecorder()
    return Session(
        config=config,
        world=world,
        layout=layout,
        batch_broadcast=batch_broadcast,
        data=data,
        attempt=attempt,
        engine=engine,
        objective=make_objective(config, world.device),
        checkpoints=checkpoints,
        save_schedule=SaveSchedule(config.checkpoint, start, world.broadcast),
        restored=restored,
        recorder=recorder,
        audit=_audit(config, layout, attempt, world, batch_broadcast),
        substitutions=substitutions,
        evaluation=evaluation,
        clock=clock,
        accounting=Accounting.of(restored.accounting, forked) if restored else Accounting(),
        notes=notes,
    )


def _changes(attempt: Attempt) -> list[str]:
    """What has changed since the attempt before, and what the user should know of the images of validation."""
    recorded, changed = attempt.read_start(), attempt.changed
    notes = [f"since attempt {attempt.number - 1}: {'; '.join(changed)}"] if changed else []
    if any(line.startswith("validation") for line in changed):
        notes.append("val_loss is measured on other images or times than before: do not compare it with its old values")
    if set(recorded.get("validation", [])) & set(recorded["datasets"]):
        notes.append("validation.url is a dataset of the training, so val_loss says nothing of images not trained on")
    return notes


def _rank_zero_recorder(attempt: Attempt, start: int, config: Config, notes: list[str]) -> RankZeroRecorder:
    """Starts journal and uploader. ``notes`` gets what the user should know of where the metrics go, or do not."""
    run, tracking = attempt.run, config.tracking
    journal, check_uploader = Journal(attempt.folder, attempt.number, start, attempt.upload), lambda: list[str]()
    if tracking.uri != "none":
        try:
            notes += notes_at_start(run, tracking.uri, tracking.experiment)
            if (why := journal_only_reason(run.url, tracking.uri)) is not None:
                notes.append(why)
            else:
                check_uploader = Uploader(run.url, tracking.uri, tracking.experiment).check
        except DataError as error:  # a damaged record of where it was published before
            notes.append(f"nothing is published to MLflow: {error} The journal keeps the metrics.")
    return RankZeroRecorder(attempt, journal, check_uploader)


def _audit(config: Config, layout: Layout, attempt: Attempt, world: World, batch_broadcast: BatchBroadcast) -> Audit:
    if not (config.train.audit and batch_broadcast.reads):
        return NullAudit()
    return BatchAudit(attempt.folder / "audit", layout.data_rank(world.rank))


def _open_substitutions(
    attempt: Attempt, data: Data, restored: Restored | None, fork: Fork | None, config: Config, world: World
) -> SubstitutionLog:
    """The substitutes that earlier attempts recorded. A fork starts records of its own."""
    run = attempt.run
    records = substitution_records(run.store)
    substitutes = substitutes_of(world.run_on_rank0(records.entries), data.plan.manifests, data.plan.token_grid)
    if restored and restored.cursor and restored.cursor.ledger > substitutes.version and fork is None:
        raise DataError(
            f"{run.url}/ledger holds {substitutes.version} records of substituted images, but the commit at step "
            f"{restored.step} was made with {restored.cursor.ledger}: restore the folder"
        )
    return SubstitutionLog(records, run.log, attempt.number, config.seed, config.data.max_substituted, substitutes)


def _restore(
    engine: Engine, run: Run, data: Data, fork: Fork | None, config: Config, world: World
) -> tuple[Restored | None, Data, list[str], bool]:
    """What was restored, the data from there on, notes for the user, and whether the commit is that of a fork's
    parent."""
    restored = restore(engine, run, world)
    forked = restored is None and fork is not None
    if forked:
        restored = restore(engine, fork.run, world, fork.step)
    if restored is None:
        if config.init_from:
            new, weights = new_names(config.model, config.init_new), WeightsSource.parse(config.init_from)
            return None, data, [load_initial_weights(weights, engine, config.model, world, new)], False
        return None, data, [], False
    # A fork may have other data; its own plan then starts at the step where it branches off.
    if restored.cursor is None or (forked and restored.cursor.plan_hash != data.plan.hash):
        return restored, data, list(restored.quarantined), forked
    data, notes = data.continued(restored.cursor, restored.step, config)
    return restored, data, [*restored.quarantined, *notes], forked
