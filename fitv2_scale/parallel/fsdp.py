"""The ``fsdp`` engine: PyTorch FSDP2, HSDP where the mesh has a replicate axis.

fp32 master weights, gradients reduced in fp32 once a step, fp32 EMA in the same shards. Tensors are made on the meta
device and filled shard by shard, so no rank ever holds the whole model.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from data_sharding.errors import UserError
from fitv2_scale.model.config import ModelConfig
from fitv2_scale.model.fitv2 import FiTv2
from fitv2_scale.model.init import fill_initial
from fitv2_scale.parallel.boxes import LogicalTensor, dtensor_boxes
from fitv2_scale.parallel.engine import OptimizerConfig, Precision, StepResult


class FSDPEngine:
    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        *,
        ema_decay: float,
        trainable: list[str],
        seed: int,
        mesh: DeviceMesh,
        precision: Precision,
        compile_blocks: bool,
    ):
        with torch.device("meta"):
            network = FiTv2(model)
        _freeze(network, trainable)
        _shard(network, mesh, precision, compile_blocks)
        network.to_empty(device=mesh.device_type)
        self.network, self._ema_decay = network, ema_decay
        self._params = dict(network.named_parameters())
        with torch.no_grad():
            for name, param in self._params.items():
                for box in dtensor_boxes(param, param.to_local()).boxes:
                    fill_initial(box.tensor, name, param.shape, box.offset, seed, model)
            self._ema = {name: p.to_local().clone() for name, p in self._params.items()}
        self._trained = {name: p for name, p in self._params.items() if p.requires_grad}
        self._optimizer = _make_optimizer(list(self._trained.values()), optimizer)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.network.set_is_last_backward(last)
        self.network.set_requires_gradient_sync(last)
        loss.backward()

    def step(self, lr: float, max_norm: float) -> StepResult:
        grads = [p.grad for p in self._trained.values()]
        norm = get_total_norm(grads).full_tensor()
        value = norm.item()
        skipped = not math.isfinite(value)
        if not skipped:
            clip_grads_with_norm_(self._trained.values(), max_norm, norm)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._update_ema()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(value, skipped)

    @torch.no_grad()
    def _update_ema(self) -> None:
        ema = [self._ema[name] for name in self._trained]
        torch._foreach_lerp_(ema, [p.to_local() for p in self._trained.values()], 1 - self._ema_decay)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        self._exchange_weights_and_ema()
        try:
            yield
        finally:
            self._exchange_weights_and_ema()

    @torch.no_grad()
    def _exchange_weights_and_ema(self) -> None:
        for module in self.network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the root stays gathered after a forward pass; it must gather the new values
        # Through a copy of one tensor at a time: FSDP2 holds on to the memory of its shards, only values may move.
        for name, param in self._params.items():
            local, held = param.to_local(), self._ema[name].clone()
            self._ema[name].copy_(local)
            local.copy_(held)

    def boxes(self) -> dict[str, LogicalTensor]:
        found = {}
        for name, param in self._params.items():
            found[f"param/{name}"] = dtensor_boxes(param, param.to_local().detach())
            found[f"ema/{name}"] = dtensor_boxes(param, self._ema[name])
        for name, param in self._trained.items():
            state = self._optimizer.state[param]
            for moment in ("exp_avg", "exp_avg_sq"):
                found[f"{moment}/{name}"] = dtensor_boxes(param, state[moment].to_local())
        return found

    def scalars(self) -> dict[str, float]:
        state = self._optimizer.state[next(iter(self._trained.values()))]
        return {"optimizer_step": state["step"].item()}

    def load_scalars(self, scalars: dict[str, float]) -> None:
        for state in self._optimizer.state.values():
            state["step"].fill_(scalars["optimizer_step"])


def _freeze(network: FiTv2, trainable: list[str]) -> None:
    for name, param in network.named_parameters():
        param.requires_grad_(any(fnmatchcase(name, pattern) for pattern in trainable))
    if not any(p.requires_grad for p in network.parameters()):
        raise UserError(f"trainable: no tensor's name matches {trainable}; '*' trains all")


def _shard(network: FiTv2, mesh: DeviceMesh, precision: Precision, compile_blocks: bool) -> None:
    """Shards each block, then the rest. The loss is already divided by the global batch, so gradients are summed."""
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # the network casts where it must, times stay float32
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in (*network.blocks, network):
        if compile_blocks and module is not network:
            module.compile(dynamic=False)
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def _make_optimizer(params: list[Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(
        params,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    # AdamW would make its state in the first step; a checkpoint may have to fill it before.
    for param in params:
        optimizer.state[param] = {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }
    return optimizer
