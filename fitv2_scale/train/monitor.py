"""Examines every step, one step late: the host reads its results while the device is busy with the next step.

What is decided here depends on numbers that are the same on all ranks, and on no clock: all ranks decide the same,
after the same step.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_sharding.stream.batch import StepBatch
from fitv2_scale.parallel.engine import StepResult
from fitv2_scale.run.run import NOT_FINITE
from fitv2_scale.train.metrics.accounting import AttemptClock, Elapsed
from fitv2_scale.train.metrics.meter import Meter, StepNumbers
from fitv2_scale.train.progress_bar import ProgressBar
from fitv2_scale.train.session import Session

_SKIPPED_AT_END = 2  # steps in a row at the end of a run; a single one happens to runs that are well


class Monitor:
    def __init__(self, s: Session, meter: Meter, progress: ProgressBar):
        self._s, self._meter, self._progress = s, meter, progress
        self._pending: deque[_Pending] = deque()
        self._skipped_in_row, self._examined = 0, s.start

    def add(self, batch: StepBatch, waited: float, sums: Tensor, result: StepResult) -> None:
        """Notes a step whose work has just been handed to the device. ``waited``: seconds for its data; ``sums`` is
        what ``loss_groups.group_sums`` gives, added up over this rank's packs."""
        numbers = torch.cat([sums.flatten(), torch.stack([result.norm, result.skipped])])
        self._pending.append(_Pending(batch, waited, _ToHost(numbers, self._s.clock)))

    def examine(self, newest: bool, report: bool, last: bool) -> str | None:
        """Examines all steps but the newest, that one too if ``newest``.

        Reports every ``train.log_every`` steps, and all that has been examined if ``report``. Returns why the run must
        be given up, if it must: too many steps in a row were skipped, fewer of them if the run's ``last`` step is the
        newest. A collective.
        """
        while len(self._pending) > (0 if newest else 1):
            if (reason := self._examine(self._pending.popleft())) is not None:
                return reason
        if report and self._meter.steps:
            self._report(self._examined)
        if last and self._skipped_in_row >= _SKIPPED_AT_END:
            return f"{NOT_FINITE} in the last {self._skipped_in_row} steps: these weights have no loss"
        return None

    def _examine(self, step: "_Pending") -> str | None:
        train, done = self._s.config.train, step.batch.step + 1
        (*sums, norm, skipped), ended = step.numbers.wait()
        numbers = StepNumbers(np.reshape(sums, (2, -1)), norm, bool(skipped), ended)
        self._meter.update(step.batch, numbers, step.waited)
        self._examined = done
        self._skipped_in_row = self._skipped_in_row + 1 if skipped else 0
        if self._skipped_in_row == train.max_skipped:
            return f"{NOT_FINITE} in {train.max_skipped} steps in a row, the last is step {done}"
        if done % train.log_every == 0:
            self._report(done)
        return None

    def _report(self, done: int) -> None:
        s = self._s
        metrics, spikes = self._meter.report()
        metrics |= {"lr": s.config.optimizer.lr_at(done - 1), "images": s.data.plan.total_images(done)}
        told = s.recorder.metrics(done, metrics)
        self._progress.show(done, metrics)
        for sentence in told:
            self._progress.say(sentence)
        if spikes:
            self._progress.say(str(max(spikes, key=lambda spike: spike.sigmas)))


@dataclass(frozen=True)
class _Pending:
    batch: StepBatch
    waited: float  # seconds for its data
    numbers: "_ToHost"


class _ToHost:
    """A small tensor on its way from the device to the host."""

    def __init__(self, values: Tensor, clock: AttemptClock):
        self._host, self._event = values.to("cpu", non_blocking=True), None  # from CUDA: into pinned memory
        self._clock, self._arrived = clock, clock.now()
        if values.is_cuda:
            self._event = torch.cuda.Event(blocking=True)  # sleeps: the loader needs the core
            self._event.record()

    def wait(self) -> tuple[list[float], Elapsed]:
        """The values, and when they arrived. Waits for the copy, not for what the device was given after it."""
        if self._event:
            self._event.synchronize()
            self._arrived = self._clock.now()
        return self._host.tolist(), self._arrived
