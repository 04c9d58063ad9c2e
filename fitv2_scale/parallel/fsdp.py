"""The ``fsdp`` engine: PyTorch FSDP2, HSDP if the mesh has a replicate axis, over tensor groups of any size.

fp32 master weights, gradients reduced in fp32 once per step, fp32 EMA in the same shards. Tensors are created on the
meta device and filled box by box, so no rank ever holds the whole model.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fitv2_scale.config.layout import Precision, Reshard
from fitv2_scale.model.counts import logical_parameters
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.parallel.boxes import LogicalTensor, rows_boxes
from fitv2_scale.parallel.ema import exchanged
from fitv2_scale.parallel.engine import StepResult
from fitv2_scale.parallel.engine_spec import EngineSpec
from fitv2_scale.parallel.mesh import Groups
from fitv2_scale.parallel.optimizer import AdamW, global_norm, single_value, step_result, update_ema
from fitv2_scale.parallel.tensor import broadcast_in_group, tensor_linear
from fitv2_scale.parallel.tensor_pieces import local_pieces

# FSDP2's reshard_after_forward, and whether every backward pass reshards; the last one of a step always does. FSDP2's
# default for the first (None) reshards all but the root, whose weights the backward pass needs at once.
_RESHARD: dict[Reshard, tuple[bool | None, bool]] = {"always": (None, True), "never": (False, False)}


class FSDPEngine:
    def __init__(self, spec: EngineSpec, groups: Groups):
        network = spec.network(tensor_linear(groups.tensor, spec.linear))
        after_forward, self._after_each_backward = _RESHARD[spec.reshard_after_forward]
        self._root = _shard(network, groups, spec.precision, after_forward)
        _prefetch(cast(list[FSDPModule], list(network.blocks)), spec.prefetch_blocks)
        network.to_empty(device=groups.device_type)
        self.network, self._ema_decay, self._groups, self.copy = network, spec.ema_decay, groups, groups.copy
        self._params = cast(dict[str, DTensor], dict(network.named_parameters()))
        self._logical = logical_parameters(spec.model)
        with torch.no_grad():
            for name, param in self._params.items():
                param.to_local().zero_()  # the padding of a tensor-parallel SwiGLU is in no box
                spec.fill(name, self._boxes(name, param.to_local()).boxes)
            self._ema = {name: p.to_local().clone() for name, p in self._params.items()}
        self._trained = {name: p for name, p in self._params.items() if p.requires_grad}
        self._adamw = AdamW({name: p.to_local().detach() for name, p in self._trained.items()}, spec.optimizer)
        self._split = [p for name, p in self._trained.items() if self._logical[name].is_split]
        self._replicated = [p for name, p in self._trained.items() if not self._logical[name].is_split]

    def backward(self, loss: Tensor, last: bool) -> None:
        self._root.set_is_last_backward(last)
        self._root.set_requires_gradient_sync(last)
        self._root.set_reshard_after_backward(last or self._after_each_backward)
        loss.backward()
        if last:
            broadcast_in_group(_local_grads(self._replicated), self._groups.tensor)

    @torch.no_grad()
    def step(self, lr: float, max_norm: float) -> StepResult:
        weights = [p.to_local() for p in self._trained.values()]
        grads = _local_grads(self._trained.values())
        split, replicated = _local_grads(self._split), _local_grads(self._replicated)
        result = step_result(global_norm(split, replicated, self._groups.shard, self._groups.tensor.group))
        self._adamw.step(weights, grads, result, lr, max_norm)
        update_ema([self._ema[name] for name in self._trained], weights, self._ema_decay, result.skipped)
        for param in self._trained.values():
            param.grad = None
        return result

    def ema_weights(self) -> AbstractContextManager[None]:
        params = self._params.items()
        return exchanged(lambda: ((p.to_local().detach(), self._ema[name]) for name, p in params), self.loaded)

    def boxes(self) -> dict[str, LogicalTensor]:
        found = {}
        for name, param in self._params.items():
            found[f"param/{name}"] = self._boxes(name, param.to_local().detach())
            found[f"ema/{name}"] = self._boxes(name, self._ema[name])
        for name in self._trained:
            found[f"exp_avg/{name}"] = self._boxes(name, self._adamw.exp_avg[name])
            found[f"exp_avg_sq/{name}"] = self._boxes(name, self._adamw.exp_avg_sq[name])
        return found

    def _boxes(self, name: str, local: Tensor) -> LogicalTensor:
        """The boxes of ``local``, sharded as the tensor ``name`` is."""
        param, logical = self._params[name], self._logical[name]
        _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
        pieces = local_pieces(logical, self._groups.tensor)
        return rows_boxes(pieces, logical.shape, local, offset[0], logical.is_split)

    def scalars(self) -> dict[str, float]:
        return {"optimizer_step": single_value(self._adamw.steps)}

    def derived(self) -> dict[str, float]:
        return {}  # what it computes with is made of the state in every step

    def load_scalars(self, scalars: dict[str, float]) -> None:
        self._adamw.steps.fill_(scalars["optimizer_step"])

    def loaded(self) -> None:
        for module in self.network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the root stays gathered after a forward pass: it must gather the new values


def _local_grads(params: Iterable[DTensor]) -> list[Tensor]:
    return [cast(DTensor, p.grad).to_local() for p in params]


def _shard(network: DiffusionTransformer, groups: Groups, precision: Precision, reshard: bool | None) -> FSDPModule:
    """Shards each block, then the rest; returns ``network``, now an FSDPModule. Gradients are summed, not averaged: the
    loss is divided by the global batch."""
    policy = MixedPrecisionPolicy()
    if precision != "fp32":  # the network casts where it needs to; times stay float32
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in network.blocks:
        fully_shard(block, mesh=groups.data_mesh, mp_policy=policy, reshard_after_forward=reshard)
    root = fully_shard(network, mesh=groups.data_mesh, mp_policy=policy, reshard_after_forward=reshard)
    for module in network.modules():
        if isinstance(module, FSDPModule) and groups.data_mesh.size() > 1:  # one rank alone would divide each by 1
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    return root


def _prefetch(blocks: list[FSDPModule], depth: int) -> None:
    """Each block begins to gather the weights of the next ``depth``, of those before it in the backward pass. One is
    what FSDP2 does by itself, in the order that it has seen."""
    if depth > 1:
        for i, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + depth])
            block.set_modules_to_backward_prefetch(blocks[max(i - depth, 0) : i][::-1])
