"""Training: claims the run, restores its newest intact commit, and steps until done or stopped."""

import logging
import math
import os
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from data_sharding.errors import RanksMissing, StorageDown, UserError
from data_sharding.launched import speaks_for_node
from data_sharding.standard_streams import dropping
from data_sharding.stream.batch import StepBatch
from fitv2_scale.checkpoint.copies import CopiesDiffer
from fitv2_scale.config.schema import Config
from fitv2_scale.parallel.agreement import read_alike
from fitv2_scale.parallel.failures import RankLost
from fitv2_scale.parallel.gpu_kernels import training_kernels
from fitv2_scale.parallel.rank_facts import read_data
from fitv2_scale.parallel.world import World, join
from fitv2_scale.run.log import StaleAttempt
from fitv2_scale.run.requests import watch_requests
from fitv2_scale.run.run import BAD_INPUT, BUG, DONE, GIVE_UP, NOT_FINITE, RETRY, Attempt
from fitv2_scale.train.coordination import Coordination
from fitv2_scale.train.metrics.meter import Meter
from fitv2_scale.train.monitor import Monitor
from fitv2_scale.train.profiler import Profiler
from fitv2_scale.train.progress_bar import ProgressBar
from fitv2_scale.train.rank_log import log_to
from fitv2_scale.train.session import Session
from fitv2_scale.train.setup import claim, is_complete, open_session, read_request
from fitv2_scale.train.signals import StopSignal
from fitv2_scale.train.step import train_step
from fitv2_scale.train.watchdog import Watchdog

log = logging.getLogger(__name__)


def train(config: Config, fork_from: str | None = None, ends_process: bool = False) -> int:
    """Trains in the processes that call it; returns the exit code, the same on all ranks. ``ends_process``: they end
    with it, so that signals that ask to stop are ignored from then on. Raises UserError, also if the ranks were not
    told the same."""
    stop = StopSignal(joins=True)
    with dropping(), stop.caught(for_good=ends_process), join(noted=lambda: stop.name) as world:
        stop.joined()
        try:
            fork = read_alike(world, lambda: read_request(config, fork_from, world.device))
            if is_complete(config, fork, world):
                steps = config.train.steps
                _say(
                    world.is_first, f"{config.run} has done all steps up to train.steps={steps}: raise that to continue"
                )
                return DONE
            layout, data = read_alike(world, lambda: read_data(config, world))
            attempt = claim(config, data.plan, fork, world)
        except StorageDown as error:
            _say_error(error, world)
            return RETRY
        with (
            log_to(attempt, world.rank),
            _recorded(attempt, world) as end,
            watch_requests(attempt.run, attempt.number, world.is_first) as requests,
            Watchdog(config.watchdog, world, attempt).watching() as watchdog,
            training_kernels(config, world.device),
        ):
            s = open_session(config, world, layout, data, attempt, fork)
            coordination = Coordination(world, s.batch_broadcast, stop, s.substitutions, s.checkpoints, requests)
            watchdog.cover_groups()
            end(*_loop(s, coordination, watchdog))
        return end.code


def _loop(s: Session, coordination: Coordination, watchdog: Watchdog) -> tuple[int, str]:
    """All steps of an attempt. Returns exit code and reason."""
    steps, checkpoints = s.config.train.steps, s.checkpoints
    with (
        s.open_loader() as loader,
        ProgressBar(s.start, steps, shown=s.world.is_first) as progress,
        _profiler(s) as profiler,
        checkpoints.finishing_saves(),
        coordination.ending(),
    ):
        progress.say(s.headline())
        meter = _meter(s)
        monitor = Monitor(s, meter, progress)
        for step in range(s.start, steps):
            asked = time.perf_counter()
            with watchdog.within("data", step):
                batch = coordination.next_batch(step, loader)
            waited = time.perf_counter() - asked
            if batch is not None:  # else nothing of this step is done; what was done before is kept
                with watchdog.within("step"), profiler.step(step):
                    _take(s, batch, waited, monitor)
                if step + 1 < steps:
                    coordination.look_ahead(loader)
                progress.advance()
            done, stop = step + (batch is not None), coordination.stop_reason
            end = done == steps or stop is not None
            unsaved = checkpoints.newest != done
            commit = unsaved and (end or coordination.should_save or s.save_schedule.due(done))
            evaluate = batch is not None and s.evaluation.due(done)
            with watchdog.within("step"):
                reason = monitor.examine(newest=commit or evaluate, report=commit, last=done == steps)
            if evaluate and reason is None:
                with watchdog.within("evaluate"):
                    reason = _evaluate(s, coordination, done, progress)
                if stop is None and (stop := coordination.stop_reason) is not None:
                    end, commit = True, unsaved
                    monitor.examine(newest=True, report=commit, last=False)
            if reason is not None:
                progress.say(reason)
                return GIVE_UP, reason
            if commit or end or coordination.save_ended:
                with watchdog.within("save"):
                    failed = s.save(done, start=commit, last=end, accounting=meter.accounting)
                    s.record_pace(watchdog.longest_step)
                if failed is not None:  # nothing is lost yet: the next save may succeed
                    progress.say(failed)
                    if checkpoints.gave_up or (end and checkpoints.newest != done):
                        return RETRY, failed if stop is None else f"{failed}; {stop}"
            if stop is not None and done < steps:
                if coordination.bad_input is not None:
                    raise coordination.bad_input.and_saved_at(done)
                progress.say(reason := f"{stop}: saved at step {done}")
                return RETRY, reason
    return DONE, f"all {steps} steps are done"


def _take(s: Session, batch: StepBatch, waited: float, monitor: Monitor) -> None:
    """The step of ``batch``, which ``waited`` seconds for its data."""
    with s.clock.step(batch.shape):
        sums, result = train_step(
            s.engine, batch, s.objective, s.config, s.world.device, s.wait_for_staging, s.audit.add
        )
    s.audit.write(batch.step)
    monitor.add(batch, waited, sums, result)


def _evaluate(s: Session, coordination: Coordination, done: int, progress: ProgressBar) -> str | None:
    """Evaluates what is due after ``done`` steps, unless a stop is requested meanwhile: that waits for nothing but the
    save. Evaluation comes before the save of its step, since the curve of a run has what was recorded before a COMMIT.
    Returns why the run must be given up, if it must."""
    losses = s.evaluate(done, progress.say, coordination.break_off_if_stopped)
    if done == s.config.train.steps and not all(map(math.isfinite, losses.values())):
        return f"{NOT_FINITE}: the validation loss after the last step is not"
    return None


def _meter(s: Session) -> Meter:
    config = s.config
    return Meter(
        s.world,
        config.model,
        s.data.plan.max_seqlen,
        s.accounting,
        s.clock,
        created=s.attempt.run.created,
        peak_tflops=config.tracking.peak_tflops,
        loss_counts=s.layout.tensor_rank(s.world.rank) == 0,
        spike_sigma=config.train.spike_sigma,
    )


def _profiler(s: Session) -> Profiler:
    asked, steps, last = s.config.profile.steps, s.config.profile.range, s.config.train.steps
    if steps and not range(max(s.start, steps.start), min(last, steps.stop)):
        taken = f"this attempt takes the steps after {s.start} up to {last}"
        _say(s.world.is_first, f"profile.steps={asked}: nothing is profiled, {taken}")
    folder = s.attempt.folder / "profile" if s.world.is_first else None
    return Profiler(steps, folder, s.world.device)


class _End:
    """How the attempt ended: set by calling it; ``_recorded`` writes it to end.json."""

    code, reason = BUG, "unknown"
    lost: tuple[int, ...] = ()

    def __call__(self, code: int, reason: str, lost: Sequence[int] = ()) -> None:
        self.code, self.reason, self.lost = code, reason, tuple(lost)


@contextmanager
def _recorded(attempt: Attempt, world: World) -> Generator[_End]:
    """Writes the attempt's end.json, however the attempt ends, short of a kill of all ranks: of those that are left,
    the lowest writes it. The traceback of a bug, or of what a lost rank has broken, is in the rank's log."""
    end = _End()
    try:
        yield end
    except Exception as raised:
        error = world.last_words.settle(raised)
        reason = str(error.said_by(0) if isinstance(error, UserError) else error)
        if isinstance(error, StorageDown | RanksMissing):
            end(RETRY, reason, error.ranks if isinstance(error, RankLost) else ())
            log.error("rank %d ends: %s", world.rank, error, exc_info=error)
            _say_error(error, world)
        elif isinstance(error, UserError):
            end(BAD_INPUT, reason)
            raise error from error.__cause__
        elif isinstance(error, StaleAttempt | CopiesDiffer):
            end(GIVE_UP if isinstance(error, StaleAttempt) else RETRY, reason)
            _say(world.is_first, reason)
        else:
            end(BUG, " ".join([repr(error), *getattr(error, "__notes__", [])]))  # which rank raised it
            log.error("rank %d failed", world.rank, exc_info=error)
            raise error from error.__cause__
    except BaseException as error:
        end(BUG, repr(error))
        log.exception("rank %d failed", world.rank)
        raise
    finally:
        if world.rank == min(set(range(world.size)) - set(end.lost)):
            attempt.end(end.code, end.reason, end.lost, stands_in=not world.is_first)


def _say_error(error: UserError, world: World) -> None:
    sentence = error.said_by(world.rank, speaks_for_node(os.environ))
    _say(sentence is not None, str(sentence))


def _say(shown: bool, text: str) -> None:
    if shown:
        print(text, file=sys.stderr, flush=True)
