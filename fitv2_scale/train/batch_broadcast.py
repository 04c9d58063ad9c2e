"""Storage is read once a tensor group: its first rank reads a step's batch and hands it to the others."""

import torch.distributed as dist

from data_sharding.stream.batch import StepBatch
from fitv2_scale.config.layout import Layout


class Relay:
    def __init__(self, layout: Layout, rank: int):
        """All ranks make theirs together, after joining the process group."""
        self.reads = layout.tensor_rank(rank) == 0  # whether this rank reads what its group trains on
        self._group: dist.ProcessGroup | None = None
        if layout.tensor > 1:
            ranks = range(layout.data_parallel * layout.tensor)
            teams = [list(ranks[i : i + layout.tensor]) for i in ranks[:: layout.tensor]]
            self._group, _ = dist.new_subgroups_by_enumeration(teams, backend="gloo")

    def share(self, batch: StepBatch | None) -> StepBatch:
        """The reader's batch, on all ranks of its group."""
        box = [batch]
        if self._group is not None:
            dist.broadcast_object_list(box, group=self._group, group_src=0)
        assert box[0] is not None
        return box[0]
