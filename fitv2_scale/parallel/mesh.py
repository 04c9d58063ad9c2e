"""Which rank does what: a description that can be computed and tested without any process.

Vocabulary: a mesh has axes, a tensor has dims. ``replicate`` copies of the sharded state, each spread over ``shard``
ranks; all replicate x shard ranks are data-parallel. Ranks are numbered with ``shard`` running fastest, so that a
shard group lies on neighbouring ranks, which are those of one node.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from data_sharding.errors import UserError


@dataclass(frozen=True)
class Layout:
    replicate: int
    shard: int

    @classmethod
    def of(cls, world_size: int, replicate: int) -> "Layout":
        if world_size % replicate:
            raise UserError(
                f"layout.replicate is {replicate}, which does not divide the {world_size} processes started: "
                "choose a divisor"
            )
        return cls(replicate, world_size // replicate)

    @property
    def data_parallel(self) -> int:
        return self.replicate * self.shard

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """The mesh that FSDP2 takes: 1-D, or 2-D for HSDP. Needs the process group."""
        assert self.data_parallel == dist.get_world_size()
        if self.replicate == 1:
            return init_device_mesh(device_type, (self.shard,), mesh_dim_names=("shard",))
        return init_device_mesh(device_type, (self.replicate, self.shard), mesh_dim_names=("replicate", "shard"))
