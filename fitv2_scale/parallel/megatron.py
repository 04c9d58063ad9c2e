"""The network's linears by megatron-core. Imported only if tensor > 1.

Only its layers are used: megatron-core's global state is not set up, the process group is passed in, and weights are
created on the current device (meta) and filled by the engine.
"""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about optional accelerators that are not installed
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        reduce_from_tensor_model_parallel_region,
    )
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

from fitv2_scale.model.linear import LinearFactory, Role

# Mutes its advice to set CUDA_DEVICE_MAX_CONNECTIONS=1, which would serialise FSDP's collectives and computation.
# Its annotation is of a function, whose attributes a type checker does not know.
linear_with_grad_accumulation_and_async_allreduce.warned = True  # pyrefly: ignore[missing-attribute]


class _Column(ColumnParallelLinear):
    # The compiler cannot trace the collective in its backward pass; a graph break here keeps the rest compiled.
    @torch.compiler.disable
    def forward(self, x_TD: Tensor) -> Tensor:
        return super().forward(x_TD)[0]

    @torch.compiler.disable
    def product(self, x_TD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """As ``forward``, with other weights, of any number of rows."""
        return self._forward_impl(
            input=x_TD,
            weight=weight,
            bias=bias,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.allreduce_dgrad,
            sequence_parallel=False,
            tp_group=self.tp_group,
        )

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **options) -> Tensor:
        """Adds the bias here if the weight is frozen: megatron-core gives it no gradient, even if it is trained."""
        if weight.requires_grad or bias is None:
            return super()._forward_impl(input=input, weight=weight, bias=bias, **options)
        return super()._forward_impl(input=input, weight=weight, bias=None, **options) + bias


class _Row(RowParallelLinear):
    @torch.compiler.disable
    def forward(self, x_TD: Tensor) -> Tensor:
        return super().forward(x_TD)[0]

    @torch.compiler.disable
    def product(self, x_TD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """As ``forward``, with other weights."""
        part_TD = self._forward_impl(
            input=x_TD,
            weight=weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=False,
            sequence_parallel=False,
            tp_group=None,
        )
        return reduce_from_tensor_model_parallel_region(part_TD, group=self.tp_group) + bias


def megatron_linear(group: dist.ProcessGroup, size: int) -> LinearFactory:
    """A factory of linears split over ``group``; the split dim is rounded up to a multiple of its ``size``."""
    # "CPU initialization" means: on the current device, not on a CUDA device.
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
