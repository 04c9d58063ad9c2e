"""The ``zero3`` engine: DeepSpeed's ZeRO stage 3.

DeepSpeed gathers weights, reduces each pack's gradient in float32, clips, and runs AdamW, all on flat memory: a rank
holds a range of the elements of each tensor. The EMA and the masters of frozen tensors, which DeepSpeed does not have,
are kept here. In every step DeepSpeed waits for the device, to decide whether the gradient is finite.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fitv2_scale.model.counts import logical_parameters
from fitv2_scale.model.linear import LinearFactory, Role
from fitv2_scale.parallel.boxes import LogicalTensor, flat_boxes
from fitv2_scale.parallel.deepspeed_setup import SPLIT, GatheredLinear, partition
from fitv2_scale.parallel.ema import exchanged
from fitv2_scale.parallel.engine import StepResult
from fitv2_scale.parallel.engine_spec import EngineSpec
from fitv2_scale.parallel.mesh import Groups
from fitv2_scale.parallel.optimizer import single_value
from fitv2_scale.parallel.tensor import broadcast_in_group, tensor_linear
from fitv2_scale.parallel.tensor_pieces import local_pieces


class _ZeroParameter(nn.Parameter):
    """Names what DeepSpeed adds to a parameter; there are no instances."""

    ds_tensor: Tensor  # this rank's range, in the compute precision
    ds_shape: torch.Size  # the local shape


@dataclass(frozen=True)
class _Shard:
    """This rank's range of one tensor, by kind of state: float32 views of live memory, including padding."""

    param: _ZeroParameter
    state: dict[str, Tensor]  # param, ema and, where trained, exp_avg and exp_avg_sq

    def refresh(self) -> None:
        """Updates the range that the network computes with from the master (which may be the same memory)."""
        self.param.ds_tensor.copy_(self.state["param"])

    def is_fresh(self) -> Tensor:
        """0-dim bool, on the device: whether ``refresh`` would change nothing."""
        used = self.param.ds_tensor
        return used.eq(self.state["param"].to(used.dtype)).all()


class Zero3Engine:
    def __init__(self, spec: EngineSpec, groups: Groups):
        network = spec.network(_linear(groups))
        self._logical = logical_parameters(spec.model)
        for name, param in network.named_parameters():
            setattr(param, SPLIT, self._logical[name].is_split)  # DeepSpeed counts replicated ones once in the norm
        self.network, self._zero = partition(network, spec.optimizer, groups, spec.precision)
        self._groups, self._ema_decay = groups, spec.ema_decay
        self.copy = groups.copy
        self._masters = [m.detach() for m in self._zero.fp32_partitioned_groups_flat]
        self._ema = [torch.zeros_like(m) for m in self._masters]
        self._shards = {name: self._shard(cast(_ZeroParameter, p)) for name, p in network.named_parameters()}
        self._fill(spec)

    def _shard(self, param: _ZeroParameter) -> _Shard:
        if not param.requires_grad:  # DeepSpeed keeps these in the compute precision only
            master = param.ds_tensor.float()
            return _Shard(param, {"param": master, "ema": torch.zeros_like(master)})
        zero = self._zero
        i, first, length = zero.grad_position[zero.get_param_id(param)]
        adamw = zero.optimizer.state[zero.fp32_partitioned_groups_flat[i]]
        flats = {"param": self._masters[i], "ema": self._ema[i]} | {k: adamw[k] for k in ("exp_avg", "exp_avg_sq")}
        return _Shard(param, {kind: flat.narrow(0, first, length) for kind, flat in flats.items()})

    @torch.no_grad()
    def _fill(self, spec: EngineSpec) -> None:
        for name, shard in self._shards.items():
            spec.fill(name, self._boxes(name, shard.state["param"]).boxes)
            shard.state["ema"].copy_(shard.state["param"])
        self.loaded()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.network.set_gradient_accumulation_boundary(last)
        self.network.backward(loss * self._groups.data_size)  # DeepSpeed averages; the parts of the loss add up

    @torch.no_grad()
    def step(self, lr: float, max_norm: float) -> StepResult:
        zero = self._zero
        trained = {name: s.param for name, s in self._shards.items() if s.param.requires_grad}
        replicated = [param for name, param in trained.items() if not self._logical[name].is_split]
        broadcast_in_group([zero.get_local_fp32_grad_for_param(p) for p in replicated], self._groups.tensor)
        zero.clip_grad = max_norm
        zero.set_lr(lr)
        self.network.step()
        if not zero.overflow:
            torch._foreach_lerp_(self._ema, self._masters, 1 - self._ema_decay)
        device = self._masters[0].device
        norm = torch.as_tensor(self.network.get_global_grad_norm(), dtype=torch.float32, device=device)
        return StepResult(norm, torch.tensor(float(zero.overflow), device=device))

    def ema_weights(self) -> AbstractContextManager[None]:
        states = [shard.state for shard in self._shards.values()]
        return exchanged(lambda: ((state["param"], state["ema"]) for state in states), self.loaded)

    @torch.no_grad()
    def loaded(self) -> None:
        self._zero.parameter_offload.partition_all_parameters()  # frees gathered old values
        for shard in self._shards.values():
            shard.refresh()

    def boxes(self) -> dict[str, LogicalTensor]:
        return {
            f"{kind}/{name}": self._boxes(name, flat)
            for name, shard in self._shards.items()
            for kind, flat in shard.state.items()
        }

    def _boxes(self, name: str, flat: Tensor) -> LogicalTensor:
        local_shape, start = tuple(self._shards[name].param.ds_shape), self._groups.data_rank * flat.numel()
        logical = self._logical[name]
        pieces = local_pieces(logical, self._groups.tensor)
        return flat_boxes(pieces, logical.shape, local_shape, flat, start, logical.is_split)

    def _steps(self) -> list[Tensor]:
        """AdamW's count of steps, one per flat tensor."""
        return [state["step"] for state in self._zero.optimizer.state.values()]

    def scalars(self) -> dict[str, float]:
        return {"optimizer_step": single_value(torch.stack(self._steps()))}

    def derived(self) -> dict[str, float]:
        """DeepSpeed writes the compute precision of trained tensors again in every step, that of frozen ones never: a
        flipped bit there would change all further steps, and no commit would hold it. In bf16 a rank reads 6 bytes of
        each element of its frozen ranges, and sends nothing more."""
        frozen = [shard for shard in self._shards.values() if not shard.param.requires_grad]
        fresh = [shard.is_fresh() for shard in frozen]
        return {"frozen weights": 1.0 if not fresh or torch.stack(fresh).all() else math.nan}

    def load_scalars(self, scalars: dict[str, float]) -> None:
        for step in self._steps():
            step.fill_(scalars["optimizer_step"])


def _linear(groups: Groups) -> LinearFactory:
    split = tensor_linear(groups.tensor)

    def linear(in_features: int, out_features: int, role: Role) -> nn.Module:
        if groups.tensor.size > 1 and role != "replicated":
            return split(in_features, out_features, role)
        return GatheredLinear(in_features, out_features)

    return linear
