"""Ranks as threads of the test's own process, for what they only exchange: that takes milliseconds."""

import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from data_sharding.errors import UserError
from fitv2_scale.parallel.failures import portable, shared

_GROUPS = 3


class ThreadWorld:
    """The exchanges of a ``World``, between threads."""

    def __init__(self, rank: int, size: int, groups: Iterator[tuple[list, threading.Barrier]]):
        """``groups``: what the ranks write on and meet at, for each of their groups."""
        self.rank, self.size, self.is_first = rank, size, rank == 0
        self.nodes = tuple(f"n{r // 2}" for r in range(size))
        self._groups = groups
        self._board, self._barrier = next(groups)
        self.exchanges = 0

    def apart(self) -> "ThreadWorld":
        return ThreadWorld(self.rank, self.size, self._groups)

    def place(self, rank: int) -> str:
        return f"rank {rank} on {self.nodes[rank]}"

    def all_gather(self, value: Any) -> list:
        self.exchanges += 1
        self._board[self.rank] = value
        self._barrier.wait(60)
        values = pickle.loads(pickle.dumps(self._board))
        self._barrier.wait(60)
        return values

    def raise_shared(self, failure: Exception | None) -> None:
        if error := shared(self.all_gather(portable(failure)), failure, self.rank, self.place):
            raise error

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return values.copy_(torch.stack(self.all_gather(values.clone())).sum(0))

    def broadcast(self, value: Any, source: int = 0) -> Any:
        return self.all_gather(value)[source]


def outcomes(size: int, act: Callable[[Any], Any]) -> list[Any]:
    """What ``act(world)`` returns on each rank, or the exception that it raises."""
    groups = [([None] * size, threading.Barrier(size)) for _ in range(_GROUPS)]

    def one(rank: int) -> Any:
        try:
            return act(ThreadWorld(rank, size, iter(groups)))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def refusals(size: int, act: Callable[[Any], Any]) -> list[UserError | None]:
    """The UserError that ``act(world)`` raises on each rank; None where it raises none."""
    found = [one if isinstance(one, Exception) else None for one in outcomes(size, act)]
    for error in found:
        if error is not None and not isinstance(error, UserError):
            raise error
    return found
