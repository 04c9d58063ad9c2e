"""An objective whose losses are others than it finds."""

from collections.abc import Callable

from torch import Tensor

from fitv2_scale.model.objective import ImageLosses, NoisedBatch, Objective
from fitv2_scale.model.packed_batch import PackedBatch


class ChangedLosses:
    """``objective``, but for ``change``, which makes of its losses those that are trained on."""

    def __init__(self, objective: Objective, change: Callable[[ImageLosses], ImageLosses]):
        self._objective, self._change = objective, change
        self.training_batch, self.validation_batch = objective.training_batch, objective.validation_batch

    def losses(self, network: Callable[..., Tensor], noised: NoisedBatch, batch: PackedBatch) -> ImageLosses:
        return self._change(self._objective.losses(network, noised, batch))
