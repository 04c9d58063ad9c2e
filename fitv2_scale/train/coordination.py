"""What all ranks agree on before each step: that every rank has its data, which images are substituted, that the images
are the planned ones, whether to save or to stop, and whether the save in flight has ended everywhere.

One small all-reduce a step on the CPU group. A rank that cannot continue reports that here instead of leaving: the
others would wait for it in a collective forever.
"""

from collections.abc import Sequence

import torch

from data_sharding.errors import StorageDown
from data_sharding.stream.batch import StepBatch
from data_sharding.stream.loader import Loader, SubstitutesNeeded
from data_sharding.stream.substitutes import LostFrame
from fitv2_scale.checkpoint.checkpointer import Checkpointer
from fitv2_scale.parallel.world import World
from fitv2_scale.run.requests import Requests
from fitv2_scale.run.substitutions import SubstitutionLog
from fitv2_scale.train.batch_broadcast import BatchBroadcast
from fitv2_scale.train.signals import StopSignal

_POLL = 0.2  # seconds after which a rank that waits for data looks for a signal
_STOP_PATIENCE = 5.0  # seconds that data may take after a stop was requested; the steps done can still be saved


class Coordination:
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
        # Agreed on: the same on all ranks after each ``next_batch``.
        self.stop_reason: str | None = None
        self.should_save = False  # after this step, because somebody requested it
        self.save_ended = False  # the one in flight, on all ranks: none of them waits when it finishes it

    def next_batch(self, step: int, loader: Loader | None) -> StepBatch | None:
        """This rank's part of ``step``, once every rank has its own. None if the step cannot be taken now, with the
        reason in ``stop_reason``: the storage is down, or a stop was requested while some rank waited for data.

        A rank without a loader gets its part from the rank of its tensor group that has one.

        If a frame cannot be read on any rank, all ranks substitute the same images of equal length and take this step
        again. Raises on all ranks what any of them met while loading, and RuntimeError if the ids that the ranks hold
        do not add up to those of the plan.
        """
        self._stop.step, self.should_save = step, False
        while True:
            batch, lost, error = self._load(loader) if loader else (None, (), None)
            stop, saves = self._requested()
            mine = [error is not None, len(lost), batch is not None or loader is None, stop is not None]
            mine += [saves > self._saves_obeyed, self._checkpoints.save_ended, batch.id_sum if batch else 0]
            sums = self._world.all_reduce_sum(torch.tensor(mine, dtype=torch.int64)).tolist()
            errors, lost_frames, ready, stops, to_save, ended, id_sum = sums
            self.save_ended = ended == self._world.size
            self.should_save, self._saves_obeyed = self.should_save or to_save > 0, saves
            if errors:
                return self._stop_or_raise(error)
            if stops and self.stop_reason is None:
                self.stop_reason = next(filter(None, self._world.all_gather(stop)))
            if not lost_frames:
                break
            try:
                self._substitute(lost, step, loader)
            except StorageDown as error:  # the same on all ranks; what was done before this step can still be saved
                self.stop_reason = str(error)
                return None
        if ready < self._world.size:
            return None
        batch = self._batch_broadcast.broadcast(batch)
        if id_sum != batch.step_id_sum:
            raise RuntimeError(
                f"step {batch.step}: the ranks' images are not the planned ones (sum of hashed ids differs)"
            )
        return batch

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

    def _stop_or_raise(self, mine: Exception | None) -> None:
        """What some ranks met while loading: storage that does not answer is a reason to save and stop; all ranks raise
        anything graver."""
        met = [error for error in self._world.all_gather(mine) if error is not None]
        graver = [error for error in met if not isinstance(error, StorageDown)]
        if graver:
            raise graver[0]
        self.stop_reason = str(met[0])

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
