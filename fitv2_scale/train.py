"""Training: claim the run, restore its newest whole commit, and step until done, told to stop, or unable to go on."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from data_sharding.errors import StorageDown, UserError
from data_sharding.presets import is_preset
from data_sharding.stream import StepBatch
from fitv2_scale.agreement import Agreement, StopSignal
from fitv2_scale.batches import pack_to_torch
from fitv2_scale.config import Config
from fitv2_scale.data import Data
from fitv2_scale.meter import Meter
from fitv2_scale.model.flow import flow_loss
from fitv2_scale.parallel.engine import StepResult
from fitv2_scale.parallel.mesh import Layout
from fitv2_scale.parallel.world import World, join
from fitv2_scale.progress import Progress
from fitv2_scale.run import Attempt, Run
from fitv2_scale.run_log import StaleAttempt
from fitv2_scale.session import Fork, Session, claim, is_complete, log_to, open_session

# What `fitv2 train` exits with; see the README for what a launcher does with each.
DONE, RETRY, GIVE_UP, BAD_INPUT, BUG = 0, 75, 93, 2, 1

log = logging.getLogger(__name__)


def train(config: Config, fork_from: str | None = None) -> int:
    """Trains in the processes it is started in; returns the exit code, the same on all ranks. Raises UserError."""
    if not config.run:
        raise UserError("give the run's folder as run=FOLDER")
    if presets := [url for url in config.data.urls if is_preset(url)]:
        raise UserError(f"{presets[0]} has sizes only, for `fitv2 plan`: give a dataset as data.url to train")
    fork = Fork.parse(fork_from) if fork_from else None
    with StopSignal().caught() as stop, join() as world:
        if world.on_first(lambda: is_complete(config)):
            _say(world.is_first, f"{config.run} has done its {config.train.steps} steps; raise train.steps to go on")
            return DONE
        try:
            data = Data.open(config, Layout.of(world.size, config.layout.replicate).data_parallel)
        except StorageDown as error:
            _say(world.is_first, str(error))
            return RETRY
        run, number = claim(config, data.plan, fork, world)
        with log_to(Path(run.store.path(f"attempts/{number}/logs")), world.rank), _recorded(run, number, world) as end:
            session = open_session(config, world, data, run, number, fork)
            end(*_loop(session, Agreement(world, stop, session.ledger)))
        return end.code


def _loop(s: Session, agreement: Agreement) -> tuple[int, str]:
    """All steps of an attempt. Returns exit code and reason."""
    config, train = s.config, s.config.train
    meter = Meter(s.world, config.model, s.data.plan.max_seqlen, config.tracking.peak_tflops)
    skipped_in_row, saved = 0, True
    with s.open_loader() as loader, Progress(s.start, train.steps, shown=s.world.is_first) as progress:
        progress.say(s.headline())
        for step in range(s.start, train.steps):
            asked = time.perf_counter()
            batch = agreement.next(step, loader)
            waited = time.perf_counter() - asked
            if batch is None:  # of this step nothing is done; what was done before is kept
                if meter.steps:
                    _report(s, meter, progress, step)
                if not saved:
                    s.commit(step)
                progress.say(agreement.stop_reason)
                return RETRY, f"{agreement.stop_reason}: saved at step {step}"
            loss, result = train_step(s, batch)
            meter.update(batch, loss, result, waited)
            done = step + 1

            skipped_in_row = skipped_in_row + 1 if result.skipped else 0
            if skipped_in_row == train.max_skipped:
                return (
                    GIVE_UP,
                    f"the gradient was not finite in {skipped_in_row} steps in a row, the last is step {done}",
                )

            last = done == train.steps or agreement.stop_reason is not None
            commit = last or done % config.checkpoint.every_steps == 0
            if commit or done % train.log_every == 0:
                _report(s, meter, progress, done)
            progress.advance()
            with meter.paused():
                if config.sampling.every_steps and (done % config.sampling.every_steps == 0 or done == train.steps):
                    s.record_picture(done)
                if commit:
                    s.commit(done)
                saved = commit
            if agreement.stop_reason and done < train.steps:
                return RETRY, f"{agreement.stop_reason}: saved at step {done}"
    return DONE, f"all {train.steps} steps are done"


def _report(s: Session, meter: Meter, progress: Progress, done: int) -> None:
    metrics = meter.report() | {"lr": s.config.optimizer.lr_at(done - 1)}
    metrics["images"] = s.data.plan.total_images(done)
    s.record(done, metrics)
    progress.show(done, metrics)


def train_step(s: Session, batch: StepBatch) -> tuple[Tensor, StepResult]:
    """One optimizer step. Returns this rank's share of the loss, on the device: the ranks' shares add up to it."""
    config, total = s.config, torch.zeros((), device=s.world.device)
    for i, pack in enumerate(batch.packs):
        packed = pack_to_torch(pack, s.world.device)
        loss = flow_loss(s.engine.network, packed, config.flow, config.model.classes, config.seed)
        s.engine.backward(loss, last=i == len(batch.packs) - 1)
        total += loss.detach()
    if s.audit:
        s.audit.record(batch)
    return total, s.engine.step(config.optimizer.lr_at(batch.step), config.optimizer.max_norm)


class _End:
    """How the attempt ended: set by calling it, recorded in end.json when ``_recorded`` is left."""

    code, reason = BUG, "unknown"

    def __call__(self, code: int, reason: str) -> None:
        self.code, self.reason = code, reason


@contextmanager
def _recorded(run: Run, number: int, world: World) -> Iterator[_End]:
    """Writes the attempt's end.json, whatever happens short of a kill. A bug leaves its traceback in the rank's log."""
    end = _End()
    try:
        yield end
    except UserError as error:
        end(BAD_INPUT, str(error))
        raise
    except StaleAttempt as error:
        end(GIVE_UP, str(error))
        _say(world.is_first, str(error))
    except BaseException as error:
        end(BUG, repr(error))
        log.exception("rank %d failed", world.rank)
        raise
    finally:
        if world.is_first:
            Attempt(number, run).end(end.code, end.reason)


def _say(shown: bool, text: str) -> None:
    if shown:
        print(text, file=sys.stderr, flush=True)
