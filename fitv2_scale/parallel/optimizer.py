"""The optimizer step on a rank's own shards: norm, clipping, AdamW and EMA, all on the device.

Whether a step is skipped is a tensor that the kernels read, never a branch of the program, so the host never waits. All
tensors here are local float32 tensors on one device; they may be empty.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fitv2_scale.config.sections import OptimizerConfig
from fitv2_scale.parallel.engine import StepResult

# torch 2.13 renames it, and warns about the old name, the only one in torch 2.11 and 2.12
_all_gather: Callable[..., object] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # pyrefly: ignore[deprecated]
)
_NORM_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def global_norm(
    split: Sequence[Tensor],
    replicated: Sequence[Tensor],
    shard: dist.ProcessGroup | None,
    tensor: dist.ProcessGroup | None,
) -> Tensor:
    """Norm of the whole gradient: 0-dim float32, the same bits on all ranks. A collective of ``shard`` and ``tensor``.

    ``split`` are this rank's shards of tensors that the tensor-parallel group splits, ``replicated`` those of which
    each of its ranks has a copy: they count once. A group of one is given as None. Not finite if any element is not.
    """
    partial = torch.stack([_square_sum(split), _square_sum(replicated)])
    if shard is not None:
        partial = _gather(partial, shard).sum(0)
    if tensor is not None:
        parts = _gather(partial, tensor)
        partial = torch.stack([parts[:, 0].sum(), parts[0, 1]])
    return partial.sum().sqrt().float()


def step_result(norm: Tensor) -> StepResult:
    """A step whose gradient norm is not finite is skipped."""
    return StepResult(norm, norm.isfinite().logical_not().float())


class AdamW:
    """AdamW with its state by tensor name; ``steps`` counts the steps that were not skipped."""

    def __init__(self, weights: Mapping[str, Tensor], config: OptimizerConfig):
        self._config = config
        self.exp_avg = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.exp_avg_sq = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.steps = next(iter(weights.values())).new_zeros(len(weights))  # the kernel takes one per tensor

    @torch.no_grad()
    def step(self, weights: Sequence[Tensor], grads: Sequence[Tensor], result: StepResult, lr: float, max_norm: float):
        """Updates ``weights``, in the order of the names, from gradients clipped to ``max_norm``; overwrites them."""
        config = self._config
        adamw(
            list(weights),
            list(grads),
            list(self.exp_avg.values()),
            list(self.exp_avg_sq.values()),
            [],
            list(self.steps.unbind()),
            fused=True,
            grad_scale=((result.norm + _NORM_EPS) / max_norm).clamp(min=1.0),  # the kernel divides by it
            found_inf=result.skipped,
            amsgrad=False,
            maximize=False,
            lr=lr,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )


def single_value(values: Tensor) -> float:
    """The value of all elements, NaN if they differ. Waits for the device."""
    low, high = torch.stack(values.aminmax()).tolist()
    return low if low == high else math.nan


@torch.no_grad()
def update_ema(ema: Sequence[Tensor], weights: Sequence[Tensor], decay: float, skipped: Tensor) -> None:
    """ema += (1 - decay) * (weights - ema), in place, unless ``skipped``.

    That is a step of SGD with the gradient ``weights``, weight decay -1 and learning rate -(1 - decay). The fused SGD
    updates many tensors at once without temporaries, and reads from the device whether to skip.
    """
    sgd(
        list(ema),
        list(weights),
        [None] * len(ema),
        fused=True,
        found_inf=skipped,
        weight_decay=-1.0,
        momentum=0.0,
        lr=-(1.0 - decay),
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


def _square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """0-dim float64: the order in which its parts are added does not show in a float32 norm."""
    parts = [t for t in tensors if t.numel()]
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else None)
    return torch.stack(torch._foreach_norm(parts)).double().square().sum()


def _gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks of ``group``, *values.shape): gathered and then added in rank order, a sum is bit-equal on all ranks."""
    gathered = values.new_empty(group.size() * values.numel())
    _all_gather(gathered, values.flatten(), group=group)
    return gathered.view(-1, *values.shape)
