"""Ranks as threads of the test's own process, for what they only exchange: that takes milliseconds."""

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data_sharding.errors import UserError


class ThreadWorld:
    """The exchanges of a ``World``, between threads."""

    def __init__(self, rank: int, size: int, board: list, barrier: threading.Barrier):
        self.rank, self.size, self.is_first = rank, size, rank == 0
        self.nodes = tuple(f"n{r // 2}" for r in range(size))
        self._board, self._barrier = board, barrier

    def place(self, rank: int) -> str:
        return f"rank {rank} on {self.nodes[rank]}"

    def all_gather(self, value: Any) -> list:
        self._board[self.rank] = value
        self._barrier.wait(60)
        values = pickle.loads(pickle.dumps(self._board))
        self._barrier.wait(60)
        return values

    def broadcast(self, value: Any, source: int = 0) -> Any:
        return self.all_gather(value)[source]


def refusals(size: int, act: Callable[[Any], Any]) -> list[UserError | None]:
    """The UserError that ``act(world)`` raises on each rank; None where it raises none."""
    board, barrier = [None] * size, threading.Barrier(size)

    def one(rank: int) -> UserError | None:
        try:
            act(ThreadWorld(rank, size, board, barrier))
        except UserError as error:
            return error
        return None

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
