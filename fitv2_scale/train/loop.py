"""Training: claim the run, restore its newest whole commit, and step until done, told to stop, or unable to go on."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from data_sharding.errors import StorageDown, UserError
from data_sharding.plan.size_presets import is_preset
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from fitv2_scale.parallel.world import World, join
from fitv2_scale.run.fork import Fork
from fitv2_scale.run.log import StaleAttempt
from fitv2_scale.run.requests import watch_requests
from fitv2_scale.run.run import BAD_INPUT, BUG, DONE, GIVE_UP, RETRY, Attempt, Run
from fitv2_scale.train.coordination import Agreement
from fitv2_scale.train.metrics.meter import Meter
from fitv2_scale.train.monitor import Watch
from fitv2_scale.train.profiler import Profile
from fitv2_scale.train.progress_bar import Progress
from fitv2_scale.train.session import Session
from fitv2_scale.train.setup import claim, is_complete, log_to, open_session
from fitv2_scale.train.signals import StopSignal
from fitv2_scale.train.step import train_step
from fitv2_scale.train.watchdog import Watchdog

log = logging.getLogger(__name__)


def train(config: Config, fork_from: str | None = None) -> int:
    """Trains in the processes it is started in; returns the exit code, the same on all ranks. Raises UserError."""
    if not config.run:
        raise UserError("give the run's folder as run=FOLDER")
    if presets := [url for url in config.data.urls if is_preset(url)]:
        raise UserError(f"{presets[0]} has sizes only, for `fitv2 plan`: give a dataset as data.url to train")
    fork = Fork.parse(fork_from, config.run) if fork_from else None
    with StopSignal().caught() as stop, join() as world:
        try:
            if world.run_on_rank0(lambda: is_complete(config)):
                _say(
                    world.is_first, f"{config.run} has done its {config.train.steps} steps; raise train.steps to go on"
                )
                return DONE
            hosts = world.hosts()
            layout = config.layout.over(world.size, len(set(hosts)))
            data = Data.open(config, layout.nodes(hosts))
            run, number = claim(config, data.plan, fork, world)
        except StorageDown as error:
            _say(world.is_first, str(error))
            return RETRY
        with (
            log_to(run, number, world.rank),
            _recorded(run, number, world) as end,
            watch_requests(run, number, world.is_first) as requests,
            Watchdog(config.watchdog, world, run, number).watching() as watchdog,
        ):
            session = open_session(config, world, layout, data, run, number, fork)
            agreement = Agreement(world, session.relay, stop, session.substitutions, session.checkpoints, requests)
            end(*_loop(session, agreement, watchdog))
        return end.code


def _loop(s: Session, agreement: Agreement, watchdog: Watchdog) -> tuple[int, str]:
    """All steps of an attempt. Returns exit code and reason."""
    steps = s.config.train.steps
    with (
        s.open_loader() as loader,
        Progress(s.start, steps, shown=s.world.is_first) as progress,
        _profile(s) as profile,
        s.checkpoints.settled(),
    ):
        progress.say(s.headline())
        meter = _meter(s)
        watch = Watch(s, meter, progress)
        for step in range(s.start, steps):
            asked = time.perf_counter()
            with watchdog.within("data", step):
                batch = agreement.next(step, loader)
            waited = time.perf_counter() - asked
            if batch is not None:  # else nothing is done of this step; what was done before is kept
                with watchdog.within("step"), profile.step(step):
                    sums, result = train_step(s.engine, batch, s.config, s.world.device, s.wait_for_staging)
                    if s.audit:
                        s.audit.record(batch)
                    watch.add(batch, waited, sums, result)
                progress.advance()
            done, stop = step + (batch is not None), agreement.stop_reason
            end = done == steps or stop is not None
            unsaved = s.checkpoints.newest != done
            commit = unsaved and (end or agreement.save_asked or s.cadence.due(done))
            evaluate = batch is not None and s.evaluation.due(done)
            with watchdog.within("step"):
                reason = watch.examine(newest=commit or evaluate, report=commit)
            if reason is not None:
                progress.say(reason)
                return GIVE_UP, reason
            if evaluate:
                with watchdog.within("evaluate"):
                    s.evaluate(done, progress.say)
            if commit or end or agreement.save_ended:
                with watchdog.within("save"):
                    failed = s.save(done, begin=commit, last=end, totals=meter.totals)
                    s.record_pace(watchdog.longest_step)
                if failed is not None:  # nothing is lost yet: the next save may do better
                    progress.say(failed)
                    if s.checkpoints.gave_up or (end and s.checkpoints.newest != done):
                        return RETRY, failed
            if stop is not None and done < steps:
                progress.say(reason := f"{stop}: saved at step {done}")
                return RETRY, reason
    return DONE, f"all {steps} steps are done"


def _meter(s: Session) -> Meter:
    config = s.config
    return Meter(
        s.world,
        config.model,
        s.data.plan.max_seqlen,
        s.totals,
        s.times,
        created=s.run.created,
        peak_tflops=config.tracking.peak_tflops,
        loss_counts=s.layout.tensor_rank(s.world.rank) == 0,
        spike_sigma=config.train.spike_sigma,
    )


def _profile(s: Session) -> Profile:
    asked, steps, last = s.config.profile.steps, s.config.profile.range, s.config.train.steps
    if steps and not range(max(s.start, steps.start), min(last, steps.stop)):
        taken = f"this attempt takes the steps after {s.start} up to {last}"
        _say(s.world.is_first, f"profile.steps={asked}: nothing is profiled, {taken}")
    folder = s.run.local_path(f"attempts/{s.number}/profile") if s.world.is_first else None
    return Profile(steps, folder, s.world.device)


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
    except StorageDown as error:
        end(RETRY, str(error))
        _say(world.is_first, str(error))
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
