"""megatron-core's linears as the network's factory makes them. Imported only where tensor > 1.

They are used as layers alone: nothing of megatron-core's global state is set up, the group is handed in, weights are
made on the device that is current (meta) and filled by us.
"""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of each optional accelerator that is not installed
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

from fitv2_scale.model.fitv2 import LinearFactory, Role

# Its advice, CUDA_DEVICE_MAX_CONNECTIONS=1, would queue FSDP's collectives and the computation behind each other.
linear_with_grad_accumulation_and_async_allreduce.warned = True


class _Column(ColumnParallelLinear):
    # The compiler cannot trace the collective in its backward pass; breaking here keeps the rest of a block compiled.
    @torch.compiler.disable
    def forward(self, x_TD: Tensor) -> Tensor:
        return super().forward(x_TD)[0]

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **options) -> Tensor:
        """megatron-core gives the bias of a frozen weight no gradient, even if it is trained: so it is added here."""
        if weight.requires_grad or bias is None:
            return super()._forward_impl(input=input, weight=weight, bias=bias, **options)
        return super()._forward_impl(input=input, weight=weight, bias=None, **options) + bias


class _Row(RowParallelLinear):
    @torch.compiler.disable
    def forward(self, x_TD: Tensor) -> Tensor:
        return super().forward(x_TD)[0]


def megatron_linear(group: dist.ProcessGroup, size: int) -> LinearFactory:
    """A factory of linears cut over ``group``; the cut dim is rounded up to a multiple of its ``size``."""
    # "cpu initialization" only means: on the current device, not on a CUDA device.
    config = ModelParallelConfig(
        tensor_model_parallel_size=size, use_cpu_initialization=True, perform_initialization=False
    )

    def linear(in_features: int, out_features: int, role: Role) -> nn.Module:
        made = {"config": config, "init_method": nn.init.zeros_, "bias": True, "skip_bias_add": False}
        if role == "column":
            padded = -(-out_features // size) * size
            return _Column(in_features, padded, gather_output=False, tp_group=group, **made)
        if role == "row":
            padded = -(-in_features // size) * size
            return _Row(padded, out_features, input_is_parallel=True, tp_group=group, **made)
        return nn.Linear(in_features, out_features)

    return linear
