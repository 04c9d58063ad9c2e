"""Sums over all ranks: right, the same bits everywhere, and in few messages in turn."""

from collections import defaultdict, deque

import pytest
import torch

from fitv2_scale.parallel.small_sums import exchanges
from fitv2_scale.parallel.world import join
from tests.support.ranks import run_ranks


def played(size: int) -> tuple[list[int], int, int]:
    """What each rank ends with if rank r begins with 3**r modulo 2**64, how many messages lie on the longest way from
    a beginning to an end, and the most that a rank sends. Messages of a pair arrive in the order they were sent."""
    values, depth, sent = [pow(3, r, 1 << 64) for r in range(size)], [0] * size, [0] * size
    todo, wires = [deque(exchanges(rank, size)) for rank in range(size)], defaultdict(deque)
    waiting: set[int] = set()  # those that have sent the first of what they have to do
    moved = True
    while moved:
        moved = False
        for rank, left in enumerate(todo):
            while left:
                step = left[0]
                if step.sends and rank not in waiting:
                    wires[rank, step.peer].append((values[rank], depth[rank]))
                    sent[rank] += 1
                    moved = True
                if step.adds is not None:
                    waiting.add(rank)
                    if not wires[step.peer, rank]:
                        break
                    value, behind = wires[step.peer, rank].popleft()
                    values[rank] = (values[rank] + value) % (1 << 64) if step.adds else value
                    depth[rank] = max(depth[rank], behind) + 1
                waiting.discard(rank)
                left.popleft()
                moved = True
    assert not any(todo) and not any(wires.values()), "some wait for ever, or were sent what nobody takes"
    return values, max(depth), max(sent)


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 500, 512, 1000, 1024])
def test_every_rank_ends_with_the_sum_of_all(size):
    values, depth, sent = played(size)
    assert values == [(pow(3, size, 1 << 65) - 1) // 2 % (1 << 64)] * size  # the sum of a geometric series
    assert depth <= max(1, (size - 1).bit_length() + 1) and sent <= size.bit_length()


def test_messages_in_turn_at_the_size_of_clusters():
    """The ring of gloo's all-reduce takes 2 (R - 1): 1,022 at 512 ranks."""
    assert {size: played(size)[1] for size in (8, 64, 512, 1000, 1024)} == {8: 3, 64: 6, 512: 9, 1000: 11, 1024: 10}


def summed(seed: int) -> tuple[list[int], bytes]:
    with join() as world:
        integers = torch.tensor([world.rank + 1, 2**62 + world.rank])
        numbers = torch.rand(1000, generator=torch.Generator().manual_seed(seed + world.rank), dtype=torch.float64)
        for _ in range(3):  # one after the other, with collectives between
            found = world.all_reduce_sum(numbers.clone())
            assert world.all_gather(world.rank) == list(range(world.size))
        apart = world.apart().all_reduce_sum(numbers.clone())
        assert torch.equal(apart, found)
        return world.all_reduce_sum(integers).tolist(), found.numpy().tobytes()


@pytest.mark.parametrize("size", [1, 3, 5, 8])
def test_on_real_ranks(size):
    found = run_ranks(size, summed, 5)
    wrapped = (size * 2**62 + sum(range(size)) + 2**63) % 2**64 - 2**63
    assert [integers for integers, _ in found] == [[size * (size + 1) // 2, wrapped]] * size
    assert len({numbers for _, numbers in found}) == 1
    parts = [torch.rand(1000, generator=torch.Generator().manual_seed(5 + r), dtype=torch.float64) for r in range(size)]
    numbers = torch.frombuffer(bytearray(found[0][1]), dtype=torch.float64)
    torch.testing.assert_close(numbers, torch.stack(parts).sum(0), rtol=1e-14, atol=0)
