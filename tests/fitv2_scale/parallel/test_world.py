"""What ranks learn of each other when they join."""

import os
from collections.abc import Sequence

import pytest
import torch

from data_sharding.errors import UserError
from fitv2_scale.parallel import rank_facts, world
from fitv2_scale.parallel.agreement import agree
from fitv2_scale.parallel.rank_facts import software_facts
from fitv2_scale.parallel.world import join
from tests.support.ranks import run_ranks


def said_by_ranks_of(gpus: Sequence[str | None]) -> str | None:
    """What this rank says when it joins and compares facts; ``gpus`` are the UUIDs of those of the ranks."""
    rank = int(os.environ["RANK"])
    world._gpu = lambda device: (gpus[rank], "0", 0) if gpus[rank] else None
    rank_facts._device = lambda: "NVIDIA H200" if gpus[rank] else "cpu"
    try:
        with join() as joined:
            agree(joined, software_facts())
    except UserError as error:
        return error.said_by(rank)
    return "nothing"


def test_two_ranks_with_one_gpu_are_refused():
    first, *others = run_ranks(3, said_by_ranks_of, ["a", "b", "a"])
    assert others == [None, None]
    assert first.startswith("ranks 0, 2 (") and first.endswith(
        ") would share a GPU: start a rank for each GPU, not more"
    )


def test_a_node_without_its_gpu_is_refused():
    """Its driver is broken, say; a CPU would wait for the others in another collective than they for it."""
    first, *others = run_ranks(3, said_by_ranks_of, ["a", None, "b"])
    assert others == [None, None]
    assert first.startswith('the ranks were not told the same: device is "NVIDIA H200" on ranks 0, 2 (')
    assert ' and "cpu" on rank 1 (' in first
    assert run_ranks(2, said_by_ranks_of, [None, None]) == ["nothing"] * 2


def test_a_rank_too_many_says_so_before_it_touches_a_gpu(monkeypatch):
    touched = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", touched.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert world._own_device() == (torch.device("cuda", 1), None) and touched == [torch.device("cuda", 1)]
    monkeypatch.setenv("LOCAL_RANK", "2")
    device, error = world._own_device()
    assert device.type == "cpu" and len(touched) == 1
    assert str(error) == "rank 2 of its node sees 2 GPUs: start a rank for each GPU, not more"


@pytest.mark.parametrize("size", [1, 2])
def test_what_a_rank_lacks_all_of_them_raise(size):
    *others, last = run_ranks(size, lacking_a_gpu, size - 1)
    assert last == "no GPU" and all(said.endswith(": no GPU") and "rank 1 on " in said for said in others)


def lacking_a_gpu(which: int) -> str | None:
    rank = int(os.environ["RANK"])
    world._own_device = lambda: (torch.device("cpu"), UserError("no GPU") if rank == which else None)
    try:
        with join():
            return "joined"
    except UserError as error:
        return error.said_by(rank)
