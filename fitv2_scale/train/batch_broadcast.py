"""Each tensor-parallel group reads a step's batch from storage once: its first rank reads and broadcasts it."""

import torch.distributed as dist

from data_sharding.stream.batch import StepBatch
from fitv2_scale.config.layout import Layout
from fitv2_scale.parallel.world import own_group


class BatchBroadcast:
    def __init__(self, layout: Layout, rank: int):
        """All ranks make theirs together, after joining the process group."""
        self.reads = layout.tensor_rank(rank) == 0  # whether this rank reads what its group trains on
        self._group: dist.ProcessGroup | None = None
        if layout.tensor > 1:
            ranks = range(layout.data_parallel * layout.tensor)
            groups = [list(ranks[i : i + layout.tensor]) for i in ranks[:: layout.tensor]]
            self._group = own_group(dist.new_subgroups_by_enumeration(groups, backend="gloo")[0])

    def broadcast(self, batch: StepBatch | None) -> StepBatch:
        """The batch of the rank that reads, on all ranks of its group; the others pass None."""
        box = [batch]
        if self._group is not None:
            dist.broadcast_object_list(box, group=self._group, group_src=0)
        assert box[0] is not None
        return box[0]
