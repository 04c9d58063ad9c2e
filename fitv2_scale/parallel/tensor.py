"""Tensor parallelism: linears that compute with the pieces of a rank (see ``tensor_pieces``), and gradients that are
the same on all ranks of a tensor group."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from data_sharding.errors import UserError
from fitv2_scale.model.linear import LinearFactory, plain_linear
from fitv2_scale.parallel.tensor_pieces import TensorGroup


def tensor_linear(group: TensorGroup, alone: LinearFactory = plain_linear) -> LinearFactory:
    """Linears of a rank of ``group``: those of ``alone`` in a group of one, otherwise megatron-core's.

    Raises:
        UserError: megatron-core is needed and not installed.
    """
    if group.size == 1:
        return alone
    try:
        from fitv2_scale.parallel.megatron import megatron_linear
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("megatron"):
            raise
        raise UserError("layout.tensor > 1 needs megatron-core: pip install -e '.[tensor]'") from None
    assert group.group is not None
    return megatron_linear(group.group, group.size)


def broadcast_in_group(tensors: Sequence[Tensor], group: TensorGroup) -> None:
    """Gives every rank of ``group`` rank 0's values.

    For the gradients of replicated tensors. In exact arithmetic they are equal already; but CUDA adds in an order that
    differs from run to run, and over two million steps the copies would drift apart.
    """
    if group.size == 1:
        return
    pending = [dist.broadcast(t, group=group.group, group_src=0, async_op=True) for t in tensors if t.numel()]
    for work in pending:
        if work is not None:  # as on ranks outside of the group
            work.wait()
