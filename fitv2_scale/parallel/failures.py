"""A failure of one rank ends all of them with its sentence: none waits for it, none shows a broken collective instead.

Where each rank does something for itself, all tell each other how it went (``World.raise_shared``). Anywhere else a
rank that fails leaves its last words in the store of the process group; the others find them when their collectives
break because that rank has left.
"""

import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from data_sharding.errors import StorageDown, UserError

_FAILED, _WORDS, _LEFT = "fitv2/failed", "fitv2/words", "fitv2/left"  # keys of the store
_PATIENCE = timedelta(seconds=5)  # with ranks that fail at the same time, or come for the words of the one that did
_POLL = 0.05  # seconds


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
    """The error of the first rank that failed outside of an exchange, in ``store``, where every rank can read it."""

    def __init__(self, store: dist.Store, rank: int, size: int, node: str) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._place = f"rank {rank} on {node}"
        self._settled: Exception | None = None

    def settle(self, error: Exception) -> Exception:
        """What this rank raises after it met ``error``: that of a rank that failed before, if that has broken this
        one's collectives, with ``error`` as its cause. Else ``error``, which the others can read from now on."""
        if error is self._settled or self._size == 1:
            return error
        self._settled = error
        shared_already = isinstance(error, UserError) and bool(error.origin)
        with suppress(dist.DistError, RuntimeError):  # the rank that holds the store has gone: nothing is known
            if not shared_already:
                self._settled = self._compare(error)
        if self._settled is not error:
            self._settled.__cause__ = error
        return self._settled

    def _compare(self, error: Exception) -> Exception:
        if self._store.add(_FAILED, 1) == 1:
            self._store.set(_WORDS, pickle.dumps((self._place, portable(error))).hex())
            return error
        self._store.wait([_WORDS], _PATIENCE)
        place, words = pickle.loads(bytes.fromhex(self._store.get(_WORDS).decode()))
        if not isinstance(error, UserError):
            return arisen_on(place, words)  # a broken collective; a bug of its own stays in the log, as its context
        return arisen_on(place, error) if str(error) == str(words) else error

    def leave(self) -> None:
        """Once this rank has left the group. If it failed and holds the store, as the first rank may, it stays for a
        moment, so that the others can read its words."""
        if self._settled is None:
            return
        with suppress(dist.DistError, RuntimeError):
            self._store.add(_LEFT, 1)
            until = time.monotonic() + _PATIENCE.total_seconds()
            while self._rank == 0 and self._store.add(_LEFT, 0) < self._size and time.monotonic() < until:
                time.sleep(_POLL)
