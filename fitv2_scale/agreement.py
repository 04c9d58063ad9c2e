"""What ranks must agree on before a step: that all have their data, that it is the planned data, whether to stop.

One small all-reduce a step on the CPU group. A rank that cannot go on says so instead of leaving; else the others would
wait for it in a collective for ever.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data_sharding.stream import StepBatch
from fitv2_scale.parallel.world import World

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """Notes SIGTERM, SIGUSR1 (which Slurm sends before a time limit) and Ctrl-C instead of dying of them.

    A second Ctrl-C interrupts at once, without saving.
    """

    def __init__(self) -> None:
        self.name: str | None = None

    def _note(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def caught(self) -> Iterator["StopSignal"]:
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may set handlers; nobody can send us a signal to note
            return
        before = {s: signal.signal(s, self._note) for s in _SIGNALS}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


class Agreement:
    def __init__(self, world: World, stop: StopSignal):
        self._world, self._stop = world, stop
        self.stop_reason: str | None = None  # agreed: the same on all ranks after each ``next``

    def next(self, batches: Iterator[StepBatch]) -> StepBatch:
        """This rank's part of the next step, once every rank has its own.

        Raises on all ranks what any of them met while loading, and RuntimeError if the ids that the ranks hold do not
        add up to those that the plan says.
        """
        batch: StepBatch | None = None
        error: Exception | None = None
        try:
            batch = next(batches)
        except Exception as caught:
            error = caught
        mine = [int(error is not None), int(self._stop.name is not None), batch.id_sum if batch else 0]
        errors, stops, id_sum = self._world.sum(torch.tensor(mine, dtype=torch.int64)).tolist()
        if errors:
            raise next(filter(None, self._world.gather(error)))
        if stops and self.stop_reason is None:
            self.stop_reason = next(filter(None, self._world.gather(self._stop.name)))
        if id_sum != batch.step_id_sum:
            raise RuntimeError(
                f"step {batch.step}: the ranks' images are not the planned ones (sum of hashed ids differs)"
            )
        return batch
