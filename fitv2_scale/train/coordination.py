"""What all ranks agree on before each step: that every rank has its data, which images are substituted, that all take
the same step with the planned images, whether to save or to stop, and whether the save in flight has ended everywhere.

One small sum a step over all ranks, in a group and a thread of its own: it is begun as soon as the step before has been
handed to the device, and ended before its own step is dealt to the packs, so that the host waits for no other. A rank
that cannot continue reports that here instead of leaving: the others would wait for it in a collective forever.
"""

import zlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_sharding.errors import StorageDown, UserError
from data_sharding.stream.batch import StepBatch
from data_sharding.stream.loader import Loader, SubstitutesNeeded
from data_sharding.stream.substitutes import LostFrame
from fitv2_scale.checkpoint.checkpointer import Checkpointer
from fitv2_scale.parallel.agreement import difference
from fitv2_scale.parallel.background import in_background
from fitv2_scale.parallel.failures import BrokenOff
from fitv2_scale.parallel.world import World
from fitv2_scale.run.requests import Requests
from fitv2_scale.run.substitutions import SubstitutionLog
from fitv2_scale.train.batch_broadcast import BatchBroadcast
from fitv2_scale.train.signals import StopSignal

_POLL = 0.2  # seconds after which a rank that waits for data looks for a signal
_STOP_PATIENCE = 5.0  # seconds that data may take after a stop was requested; the steps done can still be saved


_NUMBERS = 11  # that a rank adds to the sums


@dataclass(frozen=True)
class _Round:
    """What this rank has told the others of a step: the batch, or the frames it has lost, or the error it met; why it
    was asked to stop, and for how many saves. ``sums`` is what all have told."""

    batch: StepBatch | None
    lost: Sequence[LostFrame]
    error: Exception | None
    stop: str | None
    saves: int
    sums: Future[Tensor]


class Coordination:
    """All ranks make it together."""

    def __init__(
        self,
        world: World,
        batch_broadcast: BatchBroadcast,
        stop: StopSignal,
        substitutions: SubstitutionLog,
        checkpoints: Checkpointer,
        requests: Requests | None,
    ):
        """``requests`` is None on all ranks but the first."""
        self._world, self._batch_broadcast, self._stop, self._requests = world, batch_broadcast, stop, requests
        self._substitutions = substitutions
        self._checkpoints = checkpoints
        self._saves_obeyed = 0
        self._apart = world.apart()
        self._begun: _Round | None = None  # of the next step
        self._expected = False  # whether some rank may have begun the next step's: the others must follow
        # Agreed on: the same on all ranks after each ``next_batch``.
        self.stop_reason: str | None = None
        self.bad_input: UserError | None = None  # what to raise after a stop: another attempt would meet it again
        self.should_save = False  # after this step, because somebody requested it
        self.save_ended = False  # the one in flight, on all ranks: none of them waits when it finishes it

    def next_batch(self, step: int, loader: Loader | None) -> StepBatch | None:
        """This rank's part of ``step``, once every rank has its own. None if the step cannot be taken now, with the
        reason in ``stop_reason``: the storage is down, a stop was requested while some rank waited for data, or the
        data cannot be used (``bad_input``). What was done before this step can still be saved.

        A rank without a loader gets its part from the rank of its tensor group that has one.

        If a frame cannot be read on any rank, all ranks substitute the same images of equal length and take this step
        again. Raises on all ranks a bug that any of them met while loading, and RuntimeError if the ids or the tokens
        that the ranks hold do not add up to those of the plan, or they hold different numbers of packs.
        """
        self._stop.step, self.should_save = step, False
        while True:
            mine = self._begun or self._begin(loader)
            self._begun, self._expected = None, False
            errors, lost_frames, ready, stops, to_save, ended, *parts = mine.sums.result().tolist()
            # Only what was told of the save in flight: ranks may have begun before it was started.
            self.save_ended = 0 < ended == self._world.size * self._checkpoints.newest
            self.should_save, self._saves_obeyed = self.should_save or to_save > 0, mine.saves
            if errors:
                self._stop_for(self._world.raise_shared, mine.error)
                return None
            if stops and self.stop_reason is None:
                self.stop_reason = next(filter(None, self._world.all_gather(mine.stop)))
            if not lost_frames:
                break
            if not self._stop_for(self._substitute, mine.lost, step, loader):
                return None
        if ready < self._world.size:
            return None
        self._check_alike(step, mine.batch, *parts[:3])
        batch = self._batch_broadcast.broadcast(mine.batch)
        _check_whole(batch, *parts[3:])
        return batch

    def look_ahead(self, loader: Loader | None) -> None:
        """Begins the sum of the next step if this rank has its data already, and waits for nothing. To be called when
        a step has been handed to the device and another will follow, by all ranks."""
        if self.stop_reason is None:  # the same on all ranks: else no step follows
            self._expected = True
            if loader is None or loader.is_ready(0):
                self._begun = self._begin(loader)

    @contextmanager
    def ending(self) -> Generator[None]:
        """Ends, if all ranks leave together, the sum of a step that some may have begun and none will take."""
        yield
        if self._expected:
            self._expected = False
            (self._begun.sums if self._begun else self._sum([0] * _NUMBERS)).result()

    def _begin(self, loader: Loader | None) -> _Round:
        batch, lost, error = self._load(loader) if loader else (None, (), None)
        stop, saves = self._requested()
        mine = [error is not None, len(lost), batch is not None or loader is None, stop is not None]
        ended = self._checkpoints.newest if self._checkpoints.save_ended else 0
        mine += [saves > self._saves_obeyed, ended, *_part(batch)]
        return _Round(batch, lost, error, stop, saves, self._sum(mine))

    def _sum(self, mine: list[int]) -> Future[Tensor]:
        numbers = torch.tensor(mine, dtype=torch.int64)
        return in_background(lambda: self._apart.all_reduce_sum(numbers), name="agreement")

    def break_off_if_stopped(self) -> None:
        """Raises BrokenOff on all ranks if any of them was asked to stop: for work between two steps, such as an
        evaluation, which may take longer than a job that is about to end has left. The reason is in ``stop_reason``."""
        if self.stop_reason is None:
            stop, _ = self._requested()
            if self._world.all_reduce_sum(torch.tensor([stop is not None], dtype=torch.int64)).item():
                self.stop_reason = next(filter(None, self._world.all_gather(stop)))
        if self.stop_reason is not None:
            raise BrokenOff(self.stop_reason)

    def _check_alike(self, step: int, batch: StepBatch | None, readers: int, alike: int, squares: int) -> None:
        """Raises RuntimeError, on all ranks, unless all that have read a batch are at one step, of packs of one number
        and one shape: else they would wait for each other in different collectives.

        ``alike`` and ``squares`` are sums of a number and of its square over the ``readers``: the numbers are all the
        same just if readers x squares is the square of the sum.
        """
        if (readers * squares - alike * alike) % (1 << 64):
            what = difference(self._world, _common(batch) if batch else None)
            raise RuntimeError(f"step {step}: the ranks are not about to take the same step: {what}")

    def _substitute(self, lost: Sequence[LostFrame], step: int, loader: Loader | None) -> None:
        """Replaces the frames that any rank has lost, on all ranks; ``loader`` then begins again at ``step``.

        Raises StorageDown, DataError and StaleAttempt on all ranks.
        """
        all_lost = [frame for rank in self._world.all_gather(lost) for frame in rank]
        records = self._world.run_on_rank0(lambda: self._substitutions.write(all_lost, step))
        substitutes = self._substitutions.apply(records)
        # Each round must bring substitutes that the one before had not: else the same step would be tried for ever.
        useless = [f for f in all_lost if (f.dataset, f.frame) not in substitutes.frames or not records]
        if useless:
            raise RuntimeError(
                f"step {step}: frame {useless[0].frame} of dataset {useless[0].dataset} cannot be read "
                f"({useless[0].cause}), and recording substitutes for it changes nothing"
            )
        if loader:
            loader.restart(step, substitutes)

    def _stop_for(self, act: Callable[..., None], *args: Any) -> bool:
        """Whether ``act(*args)``, which raises the same kind of error on all ranks, ends well. Storage that does not
        answer and data that cannot be used are reasons to save and stop; anything graver is raised."""
        try:
            act(*args)
        except UserError as error:
            self.stop_reason = error.said_by(0)
            self.bad_input = None if isinstance(error, StorageDown) else error
            return False
        return True

    def _load(self, loader: Loader) -> tuple[StepBatch | None, Sequence[LostFrame], Exception | None]:
        """(batch, lost frames, error): one of the three, or none if a stop was requested and no data comes."""
        patience = _STOP_PATIENCE
        while not loader.is_ready(_POLL):
            patience -= _POLL if self._requested()[0] else 0
            if patience <= 0:
                return None, (), None
        try:
            return next(loader), (), None
        except SubstitutesNeeded as error:
            return None, error.lost_frames, None
        except Exception as error:
            return None, (), error

    def _requested(self) -> tuple[str | None, int]:
        """Why this rank was asked to stop, if it was, and how many saves it was asked for so far."""
        if self._requests is None:
            return self._stop.name, 0
        return self._stop.name or ("STOP" if self._requests.stop else None), self._requests.saves


def _part(batch: StepBatch | None) -> list[int]:
    """What a rank adds to the sums that ``_check_alike`` and ``_check_whole`` are given."""
    if batch is None:
        return [0] * 5
    alike = zlib.crc32(repr(_common(batch)).encode()) >> 1  # its square must fit into 63 bits
    return [1, alike, alike * alike, batch.id_sum, sum(pack.layout.tokens for pack in batch.packs)]


def _common(batch: StepBatch) -> dict[str, int]:
    """What is the same in the batches of all ranks."""
    return {
        "step": batch.step,
        "packs": len(batch.packs),
        "capacity of all packs": batch.step_capacity,
        "slots of a pack": len(batch.packs[0].label),
        "images": batch.step_images,
        "tokens": batch.step_tokens,
        "sum of hashed ids": batch.step_id_sum,
        "substituted images": batch.step_substituted,
    }


def _check_whole(batch: StepBatch, ids: int, tokens: int) -> None:
    """Raises RuntimeError unless the images of all ranks, with these sums, are those of the plan."""
    if ids != batch.step_id_sum:
        raise RuntimeError(f"step {batch.step}: the ranks' images are not the planned ones (sum of hashed ids differs)")
    planned = batch.step_tokens
    if tokens != planned and not (batch.step_substituted and tokens < planned):  # a substitute may be shorter
        raise RuntimeError(f"step {batch.step}: the ranks' images have {tokens} tokens instead of {planned} as planned")
