"""What ranks must agree on before a step: that all have their data, what replaces data that cannot be had, that it is
the planned data, whether to stop, whether all have done with the save in flight.

One small all-reduce a step on the CPU group. A rank that cannot go on says so instead of leaving; else the others would
wait for it in a collective for ever.
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
from fitv2_scale.train.batch_broadcast import Relay
from fitv2_scale.train.signals import StopSignal

_POLL = 0.2  # seconds until a rank that waits for data looks for a signal
_STOP_PATIENCE = 5.0  # seconds that data may take once a stop is asked for; what was done so far can still be saved


class Agreement:
    def __init__(
        self,
        world: World,
        relay: Relay,
        stop: StopSignal,
        substitutions: SubstitutionLog,
        checkpoints: Checkpointer,
        requests: Requests | None,
    ):
        """``requests``: on rank 0 only."""
        self._world, self._relay, self._stop, self._requests = world, relay, stop, requests
        self._substitutions = substitutions
        self._checkpoints = checkpoints
        self._saves_obeyed = 0
        # Agreed: the same on all ranks after each ``next``.
        self.stop_reason: str | None = None
        self.save_asked = False  # for a commit after this step
        self.save_ended = False  # that in flight: all ranks may settle it without waiting

    def next(self, step: int, loader: Loader | None) -> StepBatch | None:
        """This rank's part of ``step``, once every rank has its own; None if the step cannot be taken now, for which
        ``stop_reason`` says why: the storage is down, or a stop was asked for while some rank waited for data.

        A rank that does not read has no loader: it gets its part from the one of its tensor group that does.

        If a frame cannot be read on any rank, all ranks substitute the same images of equal length and take this step
        again. Raises on all ranks what any of them met while loading, and RuntimeError if the ids that the
        ranks hold do not add up to those that the plan says.
        """
        self.save_asked = False
        while True:
            batch, lost, error = self._load(loader) if loader else (None, (), None)
            stop, saves = self._wishes()
            mine = [error is not None, len(lost), batch is not None or loader is None, stop is not None]
            mine += [saves > self._saves_obeyed, self._checkpoints.ended, batch.id_sum if batch else 0]
            sums = self._world.all_reduce_sum(torch.tensor(mine, dtype=torch.int64)).tolist()
            errors, lost_frames, ready, stops, to_save, ended, id_sum = sums
            self.save_ended = ended == self._world.size
            self.save_asked, self._saves_obeyed = self.save_asked or to_save > 0, saves
            if errors:
                error = next(filter(None, self._world.all_gather(error)))
                if not isinstance(error, StorageDown):
                    raise error
                self.stop_reason = str(error)
                return None
            if stops and self.stop_reason is None:
                self.stop_reason = next(filter(None, self._world.all_gather(stop)))
            if not lost_frames:
                break
            everyones = [frame for rank in self._world.all_gather(lost) for frame in rank]
            records = self._world.run_on_rank0(lambda lost=everyones: self._substitutions.write(lost, step))
            substitutes = self._substitutions.apply(records)
            if loader:
                loader.restart(step, substitutes)
        if ready < self._world.size:
            return None
        batch = self._relay.share(batch)
        if id_sum != batch.step_id_sum:
            raise RuntimeError(
                f"step {batch.step}: the ranks' images are not the planned ones (sum of hashed ids differs)"
            )
        return batch

    def _load(self, loader: Loader) -> tuple[StepBatch | None, Sequence[LostFrame], Exception | None]:
        """(batch, lost frames, error), of which one is there; none of them if a stop is asked for and no data comes."""
        patience = _STOP_PATIENCE
        while not loader.is_ready(_POLL):
            patience -= _POLL if self._wishes()[0] else 0
            if patience <= 0:
                return None, (), None
        try:
            return next(loader), (), None
        except SubstitutesNeeded as error:
            return None, error.lost_frames, None
        except Exception as error:
            return None, (), error

    def _wishes(self) -> tuple[str | None, int]:
        """What somebody told this rank: why to stop, if it should, and how many saves were asked for so far."""
        if self._requests is None:
            return self._stop.name, 0
        return self._stop.name or ("STOP" if self._requests.stop else None), self._requests.saves
