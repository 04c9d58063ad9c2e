"""Which rank does what: a description that can be computed and tested without any process.

Vocabulary: a mesh has axes, a tensor has dims. ``replicate`` copies of the sharded state, each spread over ``shard``
ranks, each of which is a group of ``tensor`` ranks that compute one rank's work together. The replicate x shard groups
are data-parallel. Ranks are numbered with ``tensor`` running fastest, then ``shard``: what talks most lies on
neighbouring ranks, which are those of one node.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from data_sharding.errors import UserError
from fitv2_scale.parallel.tensor import TensorGroup


@dataclass(frozen=True)
class Groups:
    """A rank's place in the layout, and the process groups that it belongs to."""

    device_type: str
    data_mesh: DeviceMesh  # what FSDP2 takes: 1-D "shard", or 2-D "replicate", "shard" for HSDP
    shard: dist.ProcessGroup  # the ranks that share one copy of the state
    data: dist.ProcessGroup  # replicate x shard: the ranks with the same place in their tensor groups
    tensor: TensorGroup
    data_rank: int
    data_size: int


@dataclass(frozen=True)
class Layout:
    replicate: int
    shard: int
    tensor: int = 1

    @classmethod
    def of(cls, world_size: int, replicate: int | Literal["auto"], tensor: int = 1, nodes: int = 1) -> "Layout":
        """``auto`` is one copy on each of ``nodes`` nodes, so that gathering weights needs no network, or a single one
        where the processes do not divide. Raises UserError if ``replicate`` x ``tensor`` does not divide their number.
        """
        if replicate == "auto":
            replicate = nodes if world_size % (nodes * tensor) == 0 else 1
        if world_size % (replicate * tensor):
            asked = {"layout.replicate": replicate, "layout.tensor": tensor}
            keys = " x ".join(key for key, size in asked.items() if size > 1)
            raise UserError(
                f"{keys} is {replicate * tensor}, which does not divide the {world_size} processes started: "
                "choose a divisor"
            )
        return cls(replicate, world_size // (replicate * tensor), tensor)

    @property
    def data_parallel(self) -> int:
        return self.replicate * self.shard

    def data_rank(self, rank: int) -> int:
        return rank // self.tensor

    def tensor_rank(self, rank: int) -> int:
        return rank % self.tensor

    def nodes(self, hosts: list[str]) -> tuple[int, ...]:
        """Data-parallel ranks of each node, in order, from the node's name of each rank; all as if on one node where
        the ranks of a node are no neighbours."""
        runs = [(name, len(list(run))) for name, run in groupby(hosts[:: self.tensor])]
        scattered = len({name for name, _ in runs}) < len(runs)
        return (self.data_parallel,) if scattered else tuple(ranks for _, ranks in runs)

    def groups(self, device_type: str) -> Groups:
        """All ranks call this together, after joining the process group."""
        rank = dist.get_rank()
        assert self.data_parallel * self.tensor == dist.get_world_size()
        sizes = {"replicate": self.replicate, "shard": self.shard, "tensor": self.tensor}
        axes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
        mesh = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        tensor, data_mesh, data = TensorGroup(), mesh, dist.group.WORLD
        if self.tensor > 1:
            tensor = TensorGroup(self.tensor_rank(rank), self.tensor, mesh.get_group("tensor"))
            data_mesh = mesh["replicate", "shard"] if self.replicate > 1 else mesh["shard"]
            columns = [list(range(t, dist.get_world_size(), self.tensor)) for t in range(self.tensor)]
            data, _ = dist.new_subgroups_by_enumeration(columns)
        return Groups(
            device_type=device_type,
            data_mesh=data_mesh,
            shard=data_mesh.get_group("shard"),
            data=data,
            tensor=tensor,
            data_rank=self.data_rank(rank),
            data_size=self.data_parallel,
        )
