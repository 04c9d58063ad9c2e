"""An engine's boxes as a tensor of torch.distributed.checkpoint (DCP).

DCP asks a tensor-like object for three things: which pieces it would write, which pieces it wants filled, and the
memory of one piece. With a tensor subclass that answers, DCP itself plans, deduplicates and reshards any engine's
sharding, several boxes per rank included.
"""

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from fitv2_scale.parallel.boxes import Box, LogicalTensor


class DcpTensor(torch.Tensor):
    """A logical tensor of which this process holds some boxes. It has a shape, and no data of its own."""

    @staticmethod
    def __new__(cls, logical: LogicalTensor) -> "DcpTensor":
        return torch.Tensor._make_wrapper_subclass(cls, torch.Size(logical.shape), dtype=torch.float32)

    def __init__(self, logical: LogicalTensor):
        self._boxes = logical.boxes
        assert all(box.tensor.dtype == torch.float32 for box in logical.boxes), "state is kept in float32"

    @classmethod
    # torch declares its own as a function without ``cls``, but calls it as a class method.
    def __torch_dispatch__(cls, func, types, args: tuple = (), kwargs=None):  # pyrefly: ignore[bad-override]
        if func is torch.ops.aten.detach.default:  # DCP detaches what it plans
            return args[0]
        raise TypeError(f"a DcpTensor only describes where data lies; it cannot compute {func}")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box in self._boxes]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=torch.float32)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(box.offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=_chunk(box), properties=properties, size=self.size()),
            )
            for box in self._boxes
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return next(box.tensor for box in self._boxes if torch.Size(box.offset) == index.offset)


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offset), sizes=box.tensor.shape)
