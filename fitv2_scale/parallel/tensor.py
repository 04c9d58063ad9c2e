"""Tensor parallelism: which parts of which tensors a rank of a tensor group holds, and the linears that compute with
them.

q, k and v are cut by heads, the SwiGLU by hidden units, so that a group adds up partial results twice a block: after
attention's projection and after the SwiGLU's. Everything else, all conditioning included, is replicated: its gradient
is the same on all ranks of a group.

A SwiGLU's width need not divide: ranks then hold units that do not exist. Such a unit's weights start at zero, which
makes its gradients zero, so they stay zero; they are in no checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from data_sharding.errors import UserError
from fitv2_scale.model.fitv2 import LinearFactory, plain_linear
from fitv2_scale.parallel.boxes import Piece

_BY_ROWS = (".mlp.fc1_g.weight", ".mlp.fc1_g.bias", ".mlp.fc1_x.weight", ".mlp.fc1_x.bias", ".attn.qk_scale")
_BY_COLUMNS = (".attn.proj.weight", ".mlp.fc2.weight")
_QKV = (".attn.qkv.weight", ".attn.qkv.bias")


@dataclass(frozen=True)
class TensorGroup:
    """This rank's place in its tensor group; ``group`` is None for a group of one."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


def tensor_linear(group: TensorGroup) -> LinearFactory:
    """Linears as a rank of ``group`` holds them: nn.Linear alone, megatron-core's in company.

    Raises:
        UserError: megatron-core is needed and not installed.
    """
    if group.size == 1:
        return plain_linear
    try:
        from fitv2_scale.parallel.megatron import megatron_linear
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("megatron"):
            raise
        raise UserError("layout.tensor > 1 needs megatron-core: pip install -e '.[tensor]'") from None
    return megatron_linear(group.group, group.size)


def is_replicated(name: str) -> bool:
    """True if every rank of a tensor group holds all of the tensor ``name``."""
    return not name.endswith(_QKV + _BY_ROWS + _BY_COLUMNS)


def local_pieces(name: str, shape: Sequence[int], group: TensorGroup) -> list[Piece]:
    """What a rank of ``group`` holds of the logical tensor ``name`` of ``shape``, and where in its local tensor."""
    if group.size == 1 or is_replicated(name):
        return [Piece((0,) * len(shape), (0,) * len(shape), tuple(shape))]
    if name.endswith(_QKV):
        each = shape[0] // 3
        return [p for k in range(3) for p in _share(shape, 0, k * each, each, group, k * (each // group.size))]
    dim = 1 if name.endswith(_BY_COLUMNS) else 0
    return _share(shape, dim, 0, shape[dim], group, 0)


def _share(shape: Sequence[int], dim: int, first: int, length: int, group: TensorGroup, local: int) -> list[Piece]:
    """The rank's share of [first, first + length) along ``dim``, at ``local`` in its own tensor; the last are short."""
    each = -(-length // group.size)
    low, high = (min(length, k * each) for k in (group.rank, group.rank + 1))
    if low == high:
        return []

    def along(value: int, others: Sequence[int]) -> tuple[int, ...]:
        return tuple(value if d == dim else n for d, n in enumerate(others))

    zeros = (0,) * len(shape)
    return [Piece(along(local, zeros), along(first + low, zeros), along(high - low, shape))]


def same_on_group(tensors: Sequence[Tensor], group: TensorGroup) -> None:
    """Gives every rank of ``group`` rank 0's values.

    For the gradients of replicated tensors. In exact arithmetic they are equal already; but CUDA adds in an order that
    differs from run to run, and two million steps would let the copies drift apart.
    """
    if group.size == 1:
        return
    pending = [dist.broadcast(t, group=group.group, group_src=0, async_op=True) for t in tensors if t.numel()]
    for work in pending:
        work.wait()
