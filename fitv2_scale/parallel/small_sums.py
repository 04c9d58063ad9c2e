"""The sum of a few numbers over all ranks, in few messages one after the other.

gloo's own all-reduce goes round a ring, however small the tensor: 2 (R - 1) messages in turn, 1,022 at 512 ranks. By
recursive doubling each rank exchanges what it has with the rank whose number differs in one bit, log2(R) times. Where R
is no power of two, the ranks beyond the largest one in it give their numbers to a rank below before, and get the sum
after (Thakur, Rabenseifner and Gropp 2005, section 4.3). That is 9 in turn at 512 ranks, 11 at 1,000.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Exchange:
    """With the rank ``peer``: whether this one sends what it has, and whether it then adds what it gets, or takes that
    instead of its own (None: it gets nothing)."""

    peer: int
    sends: bool
    adds: bool | None


def exchanges(rank: int, size: int) -> Iterator[Exchange]:
    """What ``rank`` of ``size`` does, in this order."""
    doubled = 1 << (size.bit_length() - 1)
    beyond = size - doubled
    if rank >= doubled:
        yield Exchange(rank - doubled, sends=True, adds=None)
        yield Exchange(rank - doubled, sends=False, adds=False)
        return
    if rank < beyond:
        yield Exchange(rank + doubled, sends=False, adds=True)
    bit = 1
    while bit < doubled:
        yield Exchange(rank ^ bit, sends=True, adds=True)
        bit *= 2
    if rank < beyond:
        yield Exchange(rank + doubled, sends=True, adds=None)


def all_reduce_sum(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of ``values`` (a CPU tensor) over the ranks of the gloo ``group``, in place; the same bits on all of them."""
    received = torch.empty_like(values)
    for exchange in exchanges(group.rank(), group.size()):
        works = [dist.isend(values, group=group, group_dst=exchange.peer)] if exchange.sends else []
        if exchange.adds is not None:
            works.append(dist.irecv(received, group=group, group_src=exchange.peer))
        for work in works:
            assert work is not None, "this rank is not in the group"
            work.wait()
        if exchange.adds is not None:
            values.copy_(values + received if exchange.adds else received)
    return values
