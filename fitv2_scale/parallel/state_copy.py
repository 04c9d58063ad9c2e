"""Which ranks hold the same part of the state.

HSDP keeps replicas of the whole state, and a tensor group keeps a copy on each of its ranks of every tensor that it
does not split. All these copies must be equal, bit for bit, after every step.
"""

from dataclasses import dataclass

from fitv2_scale.config.layout import Layout
from fitv2_scale.parallel.tensor_pieces import is_replicated


@dataclass(frozen=True)
class StateCopy:
    """Which copy of the state a rank holds, and which part of it: of shard ``shard`` what rank ``tensor`` of a tensor
    group holds. Names are logical names, with the kind of state before them or without it."""

    replica: int = 0
    replicas: int = 1
    shard: int = 0
    tensor: int = 0
    tensor_size: int = 1

    @classmethod
    def of(cls, layout: Layout, rank: int) -> "StateCopy":
        replica, shard = divmod(layout.data_rank(rank), layout.shard)
        return cls(replica, layout.replicate, shard, layout.tensor_rank(rank), layout.tensor)

    def part(self, name: str) -> int:
        """A number that is the same on all ranks that hold the same boxes of the tensor ``name``."""
        return self.shard * self.tensor_size + (0 if is_replicated(name) else self.tensor)

    def is_shared(self, name: str) -> bool:
        """Whether other ranks hold the same boxes of the tensor ``name``."""
        return self.replicas > 1 or (self.tensor_size > 1 and is_replicated(name))

    def writes(self, name: str) -> bool:
        """Whether this rank writes its boxes of the tensor ``name``: of all ranks that hold the same boxes one does,
        and what all of them write is one copy of the state."""
        return self.replica == 0 and (self.tensor == 0 or not is_replicated(name))
