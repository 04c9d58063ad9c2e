"""Which ranks hold the same part of the state.

HSDP keeps replicas of the whole state, and a tensor group keeps a copy on each of its ranks of every tensor that it
does not split. All these copies must be equal, bit for bit, after every step.
"""

from dataclasses import dataclass

from fitv2_scale.config.layout import Layout


@dataclass(frozen=True)
class StateCopy:
    """Which copy of the state a rank holds, and which part of it: of shard ``shard`` what rank ``tensor`` of a tensor
    group holds.

    ``split`` says of a tensor whether the ranks of a tensor group hold different parts of it.
    """

    replica: int = 0
    replicas: int = 1
    shard: int = 0
    tensor: int = 0
    tensor_size: int = 1

    @classmethod
    def of(cls, layout: Layout, rank: int) -> "StateCopy":
        replica, shard = divmod(layout.data_rank(rank), layout.shard)
        return cls(replica, layout.replicate, shard, layout.tensor_rank(rank), layout.tensor)

    def part(self, split: bool) -> int:
        """A number that is the same on all ranks that hold the same boxes of a tensor."""
        return self.shard * self.tensor_size + (self.tensor if split else 0)

    def is_shared(self, split: bool) -> bool:
        """Whether other ranks hold the same boxes of a tensor."""
        return self.replicas > 1 or (self.tensor_size > 1 and not split)

    def writes(self, split: bool) -> bool:
        """Whether this rank writes its boxes of a tensor: of all ranks that hold the same boxes one does, and what all
        of them write is one copy of the state."""
        return self.replica == 0 and (self.tensor == 0 or split)
