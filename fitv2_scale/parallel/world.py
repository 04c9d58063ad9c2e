"""The processes of an attempt and their small collectives on the CPU. They are started by torchrun or by any launcher
that sets its variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without these it is one process."""

import os
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_TIMEOUT = timedelta(minutes=10)
_RECORDED = 2000  # collectives that torch's flight recorder keeps, for the watchdog to write when a rank hangs


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    cpu_group: dist.ProcessGroup  # gloo, apart from the group of the gradients

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum of a small CPU tensor over the ranks, in place (int64 wraps modulo 2**64)."""
        dist.all_reduce(values, group=self.cpu_group)
        return values

    def run_on_rank0(self, act: Callable[[], Any]) -> Any:
        """Calls ``act`` on rank 0 alone. All ranks return what it returns there, or raise what it raises there: no rank
        is left waiting."""
        outcome: Any = None
        if self.is_first:
            try:
                outcome = (act(), None)
            except Exception as error:
                outcome = (None, error)
        result, error = self.broadcast(outcome)
        if error is not None:
            raise error
        return result

    def hosts(self) -> list[str]:
        """Name of each rank's node, by rank."""
        return self.all_gather(socket.gethostname())

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def all_gather(self, value: Any) -> list:
        """Every rank's value, on all ranks, by rank."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values


def own_group(group: dist.ProcessGroup | int | None) -> dist.ProcessGroup:
    """``group``, which torch just made; on a rank that does not belong to it, torch would give something else."""
    assert isinstance(group, dist.ProcessGroup)
    return group


@contextmanager
def join() -> Generator[World]:
    """Joins the process group, a group of one without a launcher, and leaves it at the end."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(_RECORDED))
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=_TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(rank, size, device, own_group(dist.new_group(backend="gloo", timeout=_TIMEOUT)))
    finally:
        dist.destroy_process_group()
