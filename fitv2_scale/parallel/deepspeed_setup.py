"""Sets up DeepSpeed's ZeRO stage 3 for a network on the meta device and for process groups that exist already.

All of DeepSpeed's setup is in this file. Importing it imports DeepSpeed, so only the engine imports it. Stage 3 keeps a
flat range of each tensor on each data-parallel rank, gathers a module's tensors when its forward or backward begins,
and frees them when it ends.
"""

import logging
import os
import sys
import warnings
from collections.abc import Generator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_sharding.errors import UserError
from fitv2_scale.config.layout import Precision
from fitv2_scale.config.sections import OptimizerConfig
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.parallel.memory_estimate import ZERO3_BUCKET
from fitv2_scale.parallel.mesh import Groups


@contextmanager
def _added(mapping: MutableMapping, **items: Any) -> Generator[None]:
    """Adds the items whose keys are missing, and removes them afterwards."""
    added = {key: value for key, value in items.items() if key not in mapping}
    mapping.update(added)
    try:
        yield
    finally:
        for key in added:
            del mapping[key]


# Of this process; if its ranks are to use the CPU, ``join`` has hidden the GPUs. Counting them does not begin CUDA.
_ACCELERATOR = "cuda" if torch.cuda.device_count() else "cpu"

try:
    # Its autotuner would import MLflow, which takes seconds, starts a thread and may send usage data.
    with _added(os.environ, DS_ACCELERATOR=_ACCELERATOR), _added(sys.modules, mlflow=None), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optional packages that are not installed
        import deepspeed
        from deepspeed.ops import __compatible_ops__ as buildable
        from deepspeed.runtime.zero.linear import zero3_linear_wrap
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.utils import set_z3_leaf_module
except ModuleNotFoundError as error:
    if error.name != "deepspeed":
        raise
    raise UserError("layout.engine=zero3 needs DeepSpeed: pip install -e '.[zero3]'") from None

# DeepSpeed logs to stdout, where only commands write; its warnings go to the run's log.
_log = logging.getLogger("DeepSpeed")
_log.handlers.clear()
_log.propagate = True

SPLIT = "tensor_model_parallel"  # a parameter's attribute: whether the tensor group shares it out, or each rank has all
_SUB_GROUP = 100_000_000  # elements of a rank updated at once: bounds the copy of the gradient that AdamW reads


class GatheredLinear(nn.Linear):
    """nn.Linear that releases its weight between forward and backward.

    torch's own keeps a view of the gathered weight for backward, and so, layer by layer, the whole model.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # a compiled block keeps the weights themselves, which DeepSpeed empties
            return super().forward(input)
        return zero3_linear_wrap(input, self.weight, self.bias)


class _Mpu:
    """The process groups in the interface that DeepSpeed expects (model parallel unit)."""

    def __init__(self, groups: Groups):
        self._groups = groups

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._groups.tensor.group

    def get_model_parallel_rank(self) -> int:
        return self._groups.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._groups.tensor.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.data

    def get_data_parallel_rank(self) -> int:
        return self._groups.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._groups.data_size


@contextmanager
def _no_compiler() -> Generator[None]:
    """Keeps DeepSpeed from compiling its own CPU collectives (a minute of C++ at first use); gloo's are enough."""
    name = "deepspeed_shm_comm"
    before = buildable[name]
    buildable[name] = False
    try:
        yield
    finally:
        buildable[name] = before


def partition(
    network: DiffusionTransformer, config: OptimizerConfig, groups: Groups, precision: Precision
) -> tuple[deepspeed.DeepSpeedEngine, DeepSpeedZeroOptimizer_Stage3]:
    """Shards ``network``, which is on the meta device, one tensor at a time; all values are zero.

    Returns DeepSpeed's engine, which computes the network and averages gradients over the data-parallel ranks, and its
    optimizer, whose float32 masters and AdamW state exist from the start.
    """
    settings, mpu = _settings(network, precision), _Mpu(groups)
    for block in network.blocks:
        set_z3_leaf_module(block, True)  # gathered and reduced as a whole
        block.register_forward_pre_hook(_reached_by_gradients)
    os.environ.setdefault("LOCAL_RANK", "0")  # unset without a launcher, and DeepSpeed reads it in every forward pass
    with _no_compiler():
        deepspeed.init_distributed(verbose=False)  # takes the process group that exists
        init = deepspeed.zero.Init(data_parallel_group=groups.data, config_dict_or_path=settings, mpu=mpu)
        _partition_one_by_one(network, init, groups.device_type)
        adamw = torch.optim.AdamW(
            [p for p in network.parameters() if p.requires_grad],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        engine, optimizer, _, _ = deepspeed.initialize(model=network, optimizer=adamw, config=settings, mpu=mpu)
    assert isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)
    # AdamW would create its state in the first step; a checkpoint may fill it before.
    for master in optimizer.fp32_partitioned_groups_flat:
        adamw.state[master] = {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }
    return engine, optimizer


def _reached_by_gradients(block: nn.Module, inputs: tuple) -> tuple:
    """Makes a block's input require a gradient: DeepSpeed reduces the block's gradients when those of its inputs exist,
    and too early if no input requires one."""
    x, *others = inputs
    if torch.is_grad_enabled() and not any(isinstance(i, Tensor) and i.requires_grad for i in inputs):
        x = x.detach().requires_grad_()
    return x, *others


def _settings(network: nn.Module, precision: Precision) -> dict:
    """DeepSpeed's configuration."""
    vectors = max(p.numel() for p in network.parameters() if p.dim() == 1)
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, but not used: the engine counts packs
        "steps_per_print": None,
        "bf16": {"enabled": precision == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": ZERO3_BUCKET,
            "sub_group_size": _SUB_GROUP,
            "stage3_prefetch_bucket_size": ZERO3_BUCKET,
            "stage3_max_reuse_distance": 0,  # by default a model below 1e9 elements stays gathered until backward
            "stage3_param_persistence_threshold": vectors,  # biases stay gathered: they are too small to send each time
            "memory_efficient_linear": False,  # would replace torch.nn.functional.linear in the whole process
        },
    }


def _partition_one_by_one(network: nn.Module, init: deepspeed.zero.Init, device: str) -> None:
    for module in network.modules():
        for name, meta in list(module.named_parameters(recurse=False)):
            param = nn.Parameter(torch.zeros(meta.shape, dtype=init.dtype, device=device), meta.requires_grad)
            setattr(param, SPLIT, getattr(meta, SPLIT, False))
            setattr(module, name, param)
            init._convert_to_zero_parameters([param])
