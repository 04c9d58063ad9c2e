"""The process groups of a layout (see ``config.layout``)."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fitv2_scale.config.layout import Layout
from fitv2_scale.parallel.state_copy import StateCopy
from fitv2_scale.parallel.tensor_pieces import TensorGroup
from fitv2_scale.parallel.world import own_group


@dataclass(frozen=True)
class Groups:
    """A rank's position in the layout, and the process groups that it belongs to."""

    device_type: str
    data_mesh: DeviceMesh  # what FSDP2 takes: 1-D "shard", or 2-D "replicate", "shard" for HSDP
    shard: dist.ProcessGroup  # the ranks that hold one copy of the state together
    data: dist.ProcessGroup  # replicate x shard: the ranks with the same position in their tensor groups
    tensor: TensorGroup
    data_rank: int
    data_size: int
    copy: StateCopy


def make_groups(layout: Layout, device_type: str) -> Groups:
    """All ranks call this together, after joining the process group."""
    rank = dist.get_rank()
    assert layout.data_parallel * layout.tensor == dist.get_world_size()
    sizes = {"replicate": layout.replicate, "shard": layout.shard, "tensor": layout.tensor}
    axes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    mesh = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    tensor, data_mesh, data = TensorGroup(), mesh, own_group(dist.group.WORLD)
    if layout.tensor > 1:
        tensor = TensorGroup(layout.tensor_rank(rank), layout.tensor, mesh.get_group("tensor"))
        data_mesh = mesh["replicate", "shard"] if layout.replicate > 1 else mesh["shard"]
        columns = [list(range(t, dist.get_world_size(), layout.tensor)) for t in range(layout.tensor)]
        data = own_group(dist.new_subgroups_by_enumeration(columns)[0])
    return Groups(
        device_type=device_type,
        data_mesh=data_mesh,
        shard=data_mesh.get_group("shard"),
        data=data,
        tensor=tensor,
        data_rank=layout.data_rank(rank),
        data_size=layout.data_parallel,
        copy=StateCopy.of(layout, rank),
    )
