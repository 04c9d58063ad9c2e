"""What the agreement before each step costs: our sum over all ranks beside gloo's own all-reduce, between real
processes of this machine."""

import multiprocessing
import time
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection

import numpy as np
import torch
import torch.distributed as dist

from fitv2_scale.parallel.small_sums import all_reduce_sum, exchanges

_NUMBERS = 11  # that each rank adds
_LONGEST = timedelta(minutes=10)  # on a busy machine
_PROCESSES = 64  # at most, whatever the number of ranks
_ROUNDS, _REPEATS = 10, 20


def measure_agreement(ranks: int) -> dict[tuple[str, str], float]:
    """The rows of ``ranks``: messages in turn, and the wall time between as many processes of this machine, or 64."""
    found, of_ring = _measured(min(ranks, _PROCESSES)), "agreement by gloo's ring"
    times = {kind: 1000 * float(np.median(seconds)) for kind, seconds in found.items()}
    turns = messages_in_turn(ranks)
    return {
        ("agreement", "messages in turn"): turns["ours"],
        (of_ring, "messages in turn"): turns["gloo"],
        ("agreement, at most 64 processes here", "ms"): times["ours"],
        (f"{of_ring}, at most 64 here", "ms"): times["gloo"],
    }


@cache
def _measured(processes: int) -> dict[str, list[float]]:
    return measure(processes, _ROUNDS, _REPEATS)


def messages_in_turn(ranks: int) -> dict[str, int]:
    """On the longest way through one sum: of ours, and of gloo's ring."""
    ours = len([e for e in exchanges(0, ranks) if e.adds is not None]) + (ranks & (ranks - 1) != 0)
    return {"ours": ours, "gloo": 2 * (ranks - 1)}


def measure(ranks: int, rounds: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of a sum, by kind: the median of ``repeats`` for each of ``rounds``, which alternate between the two."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    receiver, sender = context.Pipe(duplex=False)
    started = [
        context.Process(target=_rank, args=(sender if rank == 0 else None, rank, ranks, store.port, rounds, repeats))
        for rank in range(ranks)
    ]
    try:
        for process in started:
            process.start()
        sender.close()
        if not receiver.poll(_LONGEST.total_seconds()):
            raise RuntimeError(f"{ranks} processes did not end their sums within {_LONGEST}")
        found = receiver.recv()
        for process in started:
            process.join()
        return found
    finally:
        for process in started:
            process.kill()


def _rank(pipe: Connection | None, rank: int, ranks: int, port: int, rounds: int, repeats: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=_LONGEST)
    group = dist.group.WORLD
    assert group is not None
    kinds = {"ours": lambda x: all_reduce_sum(x, group), "gloo": lambda x: dist.all_reduce(x, group=group)}
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, act in kinds.items():
            seconds = []
            for _ in range(repeats):
                values = torch.full((_NUMBERS,), rank, dtype=torch.int64)
                began = time.perf_counter()
                act(values)
                seconds.append(time.perf_counter() - began)
                assert values.tolist() == [ranks * (ranks - 1) // 2] * _NUMBERS
            found[kind].append(float(np.median(seconds)))
    if pipe is not None:
        pipe.send(found)
    dist.barrier()
    dist.destroy_process_group()
