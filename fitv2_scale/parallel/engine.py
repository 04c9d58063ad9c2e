"""What the training loop asks of an engine. Everything about processes, shards and precision hides behind this."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from data_sharding.errors import UserError
from fitv2_scale.parallel.boxes import LogicalTensor


class OptimizerConfig(BaseModel):
    """AdamW, with linear warm-up to a constant learning rate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float = Field(1e-4, gt=0, description="learning rate after warm-up; never scaled by the batch or the ranks")
    warmup_steps: int = Field(5000, ge=0, description="optimizer steps of linear warm-up")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")

    def lr_at(self, step: int) -> float:
        """Learning rate of step ``step``, counted from 0."""
        return self.lr * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else self.lr


Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class StepResult:
    """What a step did: tensors on the device, the same on all ranks. Reading them waits for the step."""

    norm: Tensor  # 0-dim float32, of the whole gradient, before clipping
    skipped: Tensor  # 0-dim float32, 1: the gradient was not finite, weights, moments and EMA stay as they were; else 0


class Engine(Protocol):
    network: Callable[..., Tensor]  # FiTv2.forward, in the engine's precision; every rank must call it equally often

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds a pack's gradient; at ``last`` the sum over packs is reduced (summed) over the data-parallel ranks."""

    def step(self, lr: float, max_norm: float) -> StepResult:
        """Clips, updates weights and EMA, clears gradients. The same result on every rank."""

    def ema_weights(self) -> AbstractContextManager[None]:
        """Inside, the network computes with the EMA weights; afterwards the raw ones are back, bit for bit."""

    def boxes(self) -> dict[str, LogicalTensor]:
        """All state by logical name: param/NAME, ema/NAME, and exp_avg/NAME, exp_avg_sq/NAME of trained tensors.

        From the first step on they stay where they are: the boxes of an earlier call are as good.
        """

    def scalars(self) -> dict[str, float]:
        """State that is no tensor, the same on all ranks."""

    def load_scalars(self, scalars: dict[str, float]) -> None: ...

    def loaded(self) -> None:
        """To be called after the boxes were written into: what the engine derives from them is made anew."""


def freeze(network: nn.Module, trainable: list[str]) -> None:
    """Trains what a pattern of ``trainable`` matches, and nothing else. Raises UserError if that is nothing."""
    for name, param in network.named_parameters():
        param.requires_grad_(any(fnmatchcase(name, pattern) for pattern in trainable))
    if not any(p.requires_grad for p in network.parameters()):
        raise UserError(f"trainable: no tensor's name matches {trainable}; '*' trains all")
