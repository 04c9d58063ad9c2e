"""A failure of one rank ends all of them with its sentence: none waits for it, none shows a broken collective instead.

Where each rank does something for itself, all tell each other how it went (``World.raise_shared``). Anywhere else a
rank that fails leaves its last words in the store of the process group; the others find them when their collectives
break because that rank has left.
"""

import pickle
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch.distributed as dist

from data_sharding.errors import RanksMissing, StorageDown, UserError
from fitv2_scale.parallel.group_store import ANSWER, appears, in_time, served_by_rank0

_FAILED, WORDS, _LEFT = "fitv2/failed", "fitv2/words", "fitv2/left"  # keys of the store
_WRITING = 30.0  # seconds in which the first rank that fails finds out why
_LEAVING = 5.0  # seconds for the others to come for its words
_POLL = 0.05  # seconds

_BROKEN = re.compile(r"gloo|nccl|pair\.cc|connection (closed|reset|refused|was)|broken pipe|socket", re.IGNORECASE)


class RankLost(RanksMissing):
    """A collective broke because ``ranks`` have ended without a word. The message names them."""

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:  # unpickled without them, then gets them back
        super().__init__(message)
        self.ranks = tuple(ranks)

    def said_by(self, rank: int, for_node: bool = False) -> str | None:
        """Which rank has found that out does not matter."""
        return str(self) if rank == 0 or for_node or not self.origin else None


class BrokenOff(Exception):
    """Work that all ranks share is given up: all of them raise it at the same place. The message says why."""


def is_broken_collective(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and bool(_BROKEN.search(str(error)))


def portable(error: Exception | None) -> Exception | None:
    """``error`` if it survives pickling, else one with its text: a failure must not break the exchange itself."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(repr(error))


def arisen_on(place: str, error: Exception) -> Exception:
    """``error``, marked as that of the rank at ``place``, which prints it."""
    if isinstance(error, UserError):
        error.origin = error.origin or place
    else:
        error.add_note(f"({place} raised this)")
    return error


def shared(
    errors: Sequence[Exception | None], own: Exception | None, rank: int, place: Callable[[int], str]
) -> Exception | None:
    """What ``rank`` raises if the ranks met ``errors``, and itself ``own``; None if there are none.

    All ranks raise one kind of error, so that they end with one code: a bug before bad input before trouble with the
    storage. A rank raises its own where it can, and of ranks that have the same sentence, the first prints it.
    """
    failed = [(r, error) for r, error in enumerate(errors) if error is not None]
    if not failed:
        return None
    first, gravest = min(failed, key=lambda pair: (_harmless(pair[1]), pair[0]))
    if own is None or _harmless(own) > _harmless(gravest):
        return arisen_on(place(first), gravest)
    prints = next((r for r, error in failed if str(error) == str(own)), rank)
    return own if prints == rank or not isinstance(own, UserError) else arisen_on(place(prints), own)


def _harmless(error: Exception) -> int:
    return 2 if isinstance(error, StorageDown) else 1 if isinstance(error, UserError) else 0


class LastWords:
    """The error of the first rank that failed outside of an exchange, in ``store``, where every rank can read it.
    ``explained`` finds out who has broken a collective."""

    def __init__(
        self, store: dist.Store, rank: int, size: int, node: str, explained: Callable[[Exception], Exception]
    ) -> None:
        self._store, self._rank, self._size, self._explained = store, rank, size, explained
        self._place = f"rank {rank} on {node}"
        self._settled: Exception | None = None
        self._store_answers = True

    def settle(self, error: Exception) -> Exception:
        """What this rank raises after it met ``error``: that of a rank that failed before, if that has broken this
        one's collectives, with ``error`` as its cause. Else ``error``, which the others can read from now on."""
        if error is self._settled or self._size == 1:
            return error
        self._settled = error
        shared_already = isinstance(error, UserError) and bool(error.origin)
        if isinstance(error, RankLost) and 0 in error.ranks and served_by_rank0():
            self._store_answers = False  # it has gone: asked, torch would print stacks
        elif not shared_already:
            try:
                self._settled = self._compare(error)
            except (RuntimeError, TimeoutError):  # the rank that holds the store has gone, or is stopped
                self._settled, self._store_answers = self._explained(error), False
        if self._settled is not error:
            self._settled.__cause__ = error
        return self._settled

    def _compare(self, error: Exception) -> Exception:
        if in_time(lambda: self._store.add(_FAILED, 1), ANSWER) == 1:
            error = self._explained(error)
            words = pickle.dumps((self._place, portable(error))).hex()
            in_time(lambda: self._store.set(WORDS, words), ANSWER)
            return error
        place, words = in_time(self._words, 2 * _WRITING)
        if not isinstance(error, UserError) or isinstance(error, RankLost):
            return arisen_on(place, words)  # a broken collective; a bug of its own stays in the log, as its context
        return arisen_on(place, error) if str(error) == str(words) else error

    def _words(self) -> tuple[str, Exception]:
        if not appears(self._store, WORDS, _WRITING):
            raise TimeoutError("the rank that failed first has not said why")
        return pickle.loads(bytes.fromhex(self._store.get(WORDS).decode()))

    def leave(self) -> None:
        """Once this rank has left the group. Ranks that are lost will never leave."""
        if self._settled is not None and self._store_answers:
            lost = self._settled.ranks if isinstance(self._settled, RankLost) else ()
            leave(self._store, self._rank, self._size - len(lost))


def leave(store: dist.Store, rank: int, size: int) -> None:
    """For a rank that has failed. If it holds the store, as the first rank may, it stays for a moment, so that the
    others of ``size`` ranks can read why."""

    def wait() -> None:
        store.add(_LEFT, 1)
        until = time.monotonic() + _LEAVING
        while rank == 0 and store.add(_LEFT, 0) < size and time.monotonic() < until:
            time.sleep(_POLL)

    with suppress(RuntimeError, TimeoutError):
        in_time(wait, 2 * _LEAVING)
