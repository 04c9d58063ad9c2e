"""The interface of engines. Processes, shards and precision are theirs; the training loop knows only this."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fitv2_scale.parallel.boxes import LogicalTensor
from fitv2_scale.parallel.state_copy import StateCopy


@dataclass(frozen=True)
class StepResult:
    """The result of a step: tensors on the device, the same on all ranks. Reading them waits for the step."""

    norm: Tensor  # 0-dim float32, of the whole gradient, before clipping
    skipped: Tensor  # 0-dim float32; 1: the gradient was not finite, weights, moments and EMA did not change; else 0


class Engine(Protocol):
    @property
    def network(self) -> Callable[..., Tensor]:
        """The forward of DiffusionTransformer in the engine's precision. All ranks must call it equally often."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds a pack's gradient; at ``last`` the sum over packs is reduced (summed) over the data-parallel ranks."""

    def step(self, lr: float, max_norm: float) -> StepResult:
        """Clips, updates weights and EMA, clears gradients. The same result on every rank."""

    def ema_weights(self) -> AbstractContextManager[None]:
        """Inside, the network computes with the EMA weights; afterwards the raw ones are back, bit for bit."""

    def boxes(self) -> dict[str, LogicalTensor]:
        """All state by logical name: param/NAME, ema/NAME, and exp_avg/NAME, exp_avg_sq/NAME of trained tensors.

        From the first step on they stay in the same memory: the boxes of an earlier call remain valid.
        """

    @property
    def copy(self) -> StateCopy:
        """Which ranks hold the same boxes as this one."""
        ...

    def scalars(self) -> dict[str, float]:
        """State other than tensors, the same on all ranks; NaN if what is to be one value is several."""

    def derived(self) -> dict[str, float]:
        """As ``scalars``, but not part of the state: of what the engine keeps beside the state and computes with, NaN
        if that no longer follows from the state."""
        ...

    def load_scalars(self, scalars: dict[str, float]) -> None: ...

    def loaded(self) -> None:
        """To be called after the boxes were written into: updates what the engine derives from them."""
