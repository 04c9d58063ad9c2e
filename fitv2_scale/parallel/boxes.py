"""How an engine says which parts of which logical tensors it holds.

A box is a rectangle of a logical tensor: its offset in global coordinates and a live view of the local memory. Any
sharding is a list of boxes; a checkpoint is written and read in nothing else.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Box:
    offset: tuple[int, ...]
    tensor: Tensor  # a view: reading a checkpoint writes into it


@dataclass(frozen=True)
class LogicalTensor:
    """One tensor of the run in its public shape, and this rank's boxes of it (none where it holds nothing)."""

    shape: tuple[int, ...]
    boxes: list[Box]


def dtensor_boxes(placed_like: DTensor, local: Tensor) -> LogicalTensor:
    """The boxes of ``local``, a local tensor sharded as ``placed_like`` is (FSDP's own shards are one box each)."""
    _, offset = compute_local_shape_and_global_offset(
        placed_like.shape, placed_like.device_mesh, placed_like.placements
    )
    boxes = [Box(tuple(offset), local)] if local.numel() else []
    return LogicalTensor(tuple(placed_like.shape), boxes)
