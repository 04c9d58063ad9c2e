"""The processes of an attempt and their small collectives on the CPU. They are started by torchrun or by any launcher
that sets its variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without these it is one process."""

import logging
import os
import pickle
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from data_sharding.errors import UserError
from data_sharding.launched import own_rank
from fitv2_scale.parallel.device import (
    gpu_view,
    hide_gpus,
    own_device,
    sees_too_few_gpus,
    torch_without_cuda,
    unusable_gpu,
)
from fitv2_scale.parallel.failures import LastWords, arisen_on, portable, shared
from fitv2_scale.parallel.group_store import Noted, open_group_store
from fitv2_scale.parallel.presence import Presence
from fitv2_scale.parallel.rank_names import name_ranks
from fitv2_scale.parallel.roll_call import call_roll
from fitv2_scale.parallel.small_sums import all_reduce_sum
from fitv2_scale.run.stop_signals import held_back

_TIMEOUT = timedelta(minutes=10)
_LONGEST_TIMEOUT = timedelta(days=365)
_RECORDED = 2000  # collectives that torch's flight recorder keeps, for the watchdog to write when a rank hangs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    cpu_group: dist.ProcessGroup  # gloo, apart from the group of the gradients
    hosts: tuple[str, ...]  # the host name of each rank's machine, by rank
    nodes: tuple[str, ...]  # that machine as messages name it: Slurm's name for it, if there is one
    last_words: LastWords
    presence: Presence

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum of a small CPU tensor over the ranks, in place (int64 wraps modulo 2**64)."""
        return all_reduce_sum(values, self.cpu_group)

    def apart(self, timeout: timedelta = _TIMEOUT) -> "World":
        """The same ranks with a CPU group of their own, for another thread. A collective."""
        return replace(self, cpu_group=own_group(dist.new_group(backend="gloo", timeout=timeout)))

    def run_on_rank0(self, act: Callable[[], Any]) -> Any:
        """Calls ``act`` on rank 0 alone. All ranks return what it returns there, or raise what it raises there, which
        rank 0 prints: no rank is left waiting."""
        result, failure = None, None
        if self.is_first:
            try:
                result = act()
            except Exception as error:
                failure = error
        result, told = self.broadcast((result, portable(failure)))
        if told is not None:
            raise failure or arisen_on(self.place(0), told)
        return result

    def raise_shared(self, failure: Exception | None) -> None:
        """Returns if no rank gives a failure. Else all ranks raise: its own where a rank has one, elsewhere that of
        another rank. For work that each rank does for itself."""
        if error := shared(self.all_gather(portable(failure)), failure, self.rank, self.place):
            raise error

    def place(self, rank: int) -> str:
        """As messages name a rank: "rank 1 on n17"."""
        return f"rank {rank} on {self.nodes[rank]}"

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The value of the rank ``source``, on all ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self.cpu_group)
        return box[0]

    def all_gather(self, value: Any) -> list:
        """Every rank's value, on all ranks, by rank."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def gather(self, value: Any) -> list:
        """Every rank's value, on rank 0, by rank; an empty list elsewhere. A rank whose value is None sends no more
        than that."""
        data = b"" if value is None else pickle.dumps(value)
        length = torch.tensor(len(data))
        if not self.is_first:
            dist.gather(length, group=self.cpu_group)
            if data:
                dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0, group=self.cpu_group)
            return []
        lengths = torch.zeros(self.size, dtype=length.dtype)
        dist.gather(length, list(lengths.unbind()), group=self.cpu_group)
        return [value, *(self._received(rank, size) for rank, size in enumerate(lengths.tolist()) if rank)]

    def _received(self, rank: int, size: int) -> Any:
        if not size:
            return None
        data = torch.empty(size, dtype=torch.uint8)
        dist.recv(data, rank, group=self.cpu_group)
        return pickle.loads(data.numpy().data)


def own_group(group: dist.ProcessGroup | int | None) -> dist.ProcessGroup:
    """``group``, which torch just made; on a rank that does not belong to it, torch would give something else."""
    assert isinstance(group, dist.ProcessGroup)
    return group


@contextmanager
def join(failure: Exception | None = None, reports_gpu: bool = False, noted: Noted = held_back) -> Generator[World]:
    """Joins the process group, a group of one without a launcher, and leaves it at the end.

    If one machine has fewer GPUs than ranks, all compute on the CPU, and rank 0 says so. So does, with ``reports_gpu``,
    a rank whose GPU torch cannot use: the caller reports why (``device.unusable_gpu``).

    A rank that cannot do its part gives its ``failure``: all ranks raise it as soon as they have joined, as
    ``World.raise_shared`` does. A rank that fails inside is known to the others when it has left (``LastWords``).
    A signal that is ``noted`` while this rank waits for the others ends the wait of all.

    Raises:
        UserError: the launcher's variables make no rank; several nodes, or one in a job of Slurm, have fewer GPUs than
            ranks; or torch cannot use a GPU.
        RanksMissing: other ranks do not join, or not before a signal came; or hang or have ended inside, and so have
            broken a collective.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(_RECORDED))
    patience, node = _TIMEOUT.total_seconds(), _node()
    launched = own_rank(os.environ)
    rank, size = launched or (0, 1)
    device, no_gpu, too_few = torch.device("cpu"), None, None
    if not (few := sees_too_few_gpus(size)):
        device, no_gpu = own_device()  # before the roll is called: a rank whose GPU hangs is then named as missing
    if launched:
        store = open_group_store(rank, size, patience, noted)
        first, seen_alike = call_roll(store, rank, size, node, patience, gpu_view(), noted)
        if few and seen_alike:
            too_few = hide_gpus(size)
        elif few:
            device, no_gpu = own_device()
    else:
        store, first = dist.HashStore(), node
    failure = failure or no_gpu or (None if reports_gpu else unusable_gpu())
    unused = too_few or (None if reports_gpu else torch_without_cuda())
    if rank == 0 and unused and not failure:
        log.warning("%s", unused)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    presence = Presence(store, rank, size, node, first, patience)
    with presence.shown():
        dist.init_process_group(backend, timeout=_TIMEOUT, store=store, rank=rank, world_size=size)
        last_words = LastWords(store, rank, size, node, presence.explained)
        try:
            cpu_group = own_group(dist.new_group(backend="gloo", timeout=_TIMEOUT))
            yield _meet(World(rank, size, device, cpu_group, (), (), last_words, presence), failure)
        except Exception as raised:
            error = last_words.settle(raised)
            raise error from error.__cause__
        finally:
            dist.destroy_process_group()
            last_words.leave()


def _gpu(device: torch.device) -> tuple[str, str | None, int] | None:
    """Which GPU that is; None for a CPU. Parts of one may have one UUID, but not one name."""
    if device.type != "cuda":
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    return str(uuid), os.environ.get("CUDA_VISIBLE_DEVICES"), device.index


def _meet(world: World, failure: Exception | None) -> World:
    """``world`` with the names of all nodes; raises the ``failure`` of any rank, and UserError if two have one GPU."""
    mine = socket.gethostname(), _node(), portable(failure), _gpu(world.device)
    hosts, nodes, failures, gpus = zip(*world.all_gather(mine), strict=True)
    world = replace(world, hosts=hosts, nodes=nodes)
    if error := shared(failures, failure, world.rank, world.place):
        raise error
    for gpu in gpus:
        if gpu is not None and len(ranks := [rank for rank, other in enumerate(gpus) if other == gpu]) > 1:
            error = UserError(f"{name_ranks(ranks, nodes)} would share a GPU: start a rank for each GPU, not more")
            raise error if world.is_first else arisen_on(world.place(0), error)
    return world


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def set_group_timeouts(seconds: float) -> None:
    """For all groups that there are, those of meshes and engines included. More than a year is a year: torch counts
    nanoseconds in 64 bits, and a timedelta has an end as well."""
    timeout = timedelta(seconds=seconds) if seconds < _LONGEST_TIMEOUT.total_seconds() else _LONGEST_TIMEOUT
    for group in list(distributed_c10d._world.pg_map):  # torch has no public way; torchtitan uses the same call
        distributed_c10d._set_pg_timeout(timeout, group)
