"""Ranks that keep the others waiting are named by the others, from joining on, in every command.

A thread of each rank writes into the store of the process group, once a second, how many collectives of each group it
has begun and where its main thread is. A rank that waits for another has begun more of them than that one. So when a
collective breaks, because it took too long or a process has gone, the rank that all wait for is known. Half of the time
before, it is named in a warning: after that time NCCL would end the processes before they can say anything.

Training has a watchdog with closer limits, which takes over once an attempt is claimed.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from data_sharding.errors import RanksMissing
from fitv2_scale.parallel.failures import WORDS, is_broken_collective
from fitv2_scale.parallel.group_store import ANSWER, in_time, reopened
from fitv2_scale.run.run import RETRY

_SIGN = "fitv2/sign"  # key of the store: the newest sign of a rank
_SIGNS_PER_SECOND = 512  # of all ranks together
_MISSED = 8  # signs that a rank has to miss to count as silent
_NAMED = 3  # ranks in one message
_GRACE = 60.0  # seconds for a rank to end once another has failed

_PACKAGES = [Path(__file__).parents[2] / name for name in ("fitv2_scale", "data_sharding", "launchers")]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sign:
    """What a rank writes about itself."""

    node: str
    time: float  # seconds since all have joined
    waiting: float  # seconds since it began its last collective
    begun: Mapping[str, int]  # collectives, by group
    where: str  # innermost line of this project in the main thread


def waited_for(begun: Mapping[int, Mapping[str, int]]) -> list[int]:
    """The ranks that others wait for, from how many collectives of each group each rank has begun: they have begun
    fewer than another one in some group, and more than another one in none."""
    behind, ahead = set[int](), set[int]()
    for group in {group for counts in begun.values() for group in counts}:
        counts = {rank: of_rank[group] for rank, of_rank in begun.items() if group in of_rank}
        least, most = min(counts.values()), max(counts.values())
        behind |= {rank for rank, count in counts.items() if count < most}
        ahead |= {rank for rank, count in counts.items() if count > least}
    return sorted(behind - ahead)


class Progress:
    """The collectives of this rank."""

    def __init__(self) -> None:
        self._begun: Mapping[str, int] = {}
        self._changed = time.monotonic()

    def look(self) -> tuple[Mapping[str, int], float]:
        """How many it has begun, by the names of its groups, and how many groups it has begun to make, by no name; and
        for how many seconds, as far as looked, it has begun no more."""
        begun = {"": distributed_c10d._world.group_count}  # torch has no public way
        groups: list[Any] = list(distributed_c10d._world.pg_map)
        for group in groups:
            with suppress(RuntimeError):  # it is being made, or destroyed
                begun[group.group_name] = group._get_sequence_number_for_group()
        if begun != self._begun:
            self._begun, self._changed = begun, time.monotonic()
        return begun, time.monotonic() - self._changed


class Presence:
    """One on each rank; all make theirs when they have joined. Groups of processes wait for ``patience`` seconds."""

    def __init__(self, store: dist.Store, rank: int, size: int, node: str, first: str, patience: float) -> None:
        """``first``: the node of the first rank."""
        self._rank, self._size, self._node, self._first, self._patience = rank, size, node, first, patience
        self._interval = max(1.0, size / _SIGNS_PER_SECOND)
        self._store = store if size == 1 else reopened(store)
        self._joined = time.monotonic()
        self._progress, self._warned = Progress(), False
        self._ended = threading.Event()

    @contextmanager
    def shown(self) -> Generator[None]:
        if self._size == 1:
            yield
            return
        thread = threading.Thread(target=self._show, name="presence", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join(self._interval)  # no longer: the store may not answer

    def hand_over(self) -> None:
        """Another watch names ranks from now on."""
        self._ended.set()

    def explained(self, error: Exception) -> Exception:
        """RanksMissing, if ``error`` is that of a broken collective and it is known which ranks have broken it; else
        ``error``. Takes some seconds."""
        if self._size == 1 or self._ended.is_set() or not is_broken_collective(error):
            return error
        try:
            what = in_time(self._find, _MISSED * self._interval + ANSWER)
        except (dist.DistError, TimeoutError):
            what = f"rank 0 on {self._first}, or torchrun there, has ended or does not answer any more"
        return RanksMissing(f"{what}; see its log and its node, then start again") if what else error

    def _find(self) -> str:
        """Which ranks are silent, or else keep the others waiting; empty if there are none."""
        asked = self._now()
        while True:
            signs = self._signs()
            silent = [rank for rank, sign in signs.items() if sign.time < asked and rank != self._rank]
            if not silent or self._now() > asked + _MISSED * self._interval:
                break
            time.sleep(self._interval / 4)
        if silent:
            return _sentence(signs, silent, "has ended, was killed or does not answer any more, last seen")
        if signs[self._rank].waiting < self._patience / 2:
            return ""  # the network has failed; a rank that is behind computes
        return self._sentence_of_hung(signs)

    def _sentence_of_hung(self, signs: Mapping[int, Sign]) -> str:
        hung = waited_for({rank: sign.begun for rank, sign in signs.items()})
        return _sentence(signs, hung, f"has kept the others waiting for {signs[self._rank].waiting:.0f} s")

    def _show(self) -> None:
        try:
            while not self._ended.is_set():
                begun, waiting = self._progress.look()
                sign = Sign(self._node, self._now(), waiting, begun, where())
                self._store.set(f"{_SIGN}/{self._rank}", json.dumps(asdict(sign)))
                self._warn(waiting)
                if self._store.check([WORDS]) and not self._ended.wait(_GRACE):
                    log.error("rank %d ends, since another has failed; it was still in %s", self._rank, where())
                    os._exit(RETRY)
                self._ended.wait(self._interval)
        except RuntimeError as error:  # the store has gone: collectives with its rank will break
            log.debug("rank %d can no longer be seen by the others: %r", self._rank, error)

    def _now(self) -> float:
        return time.monotonic() - self._joined

    def _signs(self) -> dict[int, Sign]:
        texts = self._store.multi_get([f"{_SIGN}/{rank}" for rank in range(self._size)])
        return {rank: Sign(**json.loads(text)) for rank, text in enumerate(texts)}

    def _warn(self, waiting: float) -> None:
        """Names who keeps this rank ``waiting``, once. The first rank does so, or the second if it is the first."""
        late = waiting > self._patience / 2
        if self._rank < 2 and late and not self._warned:
            signs = self._signs()
            hung = waited_for({rank: sign.begun for rank, sign in signs.items()})
            if hung and self._rank == min(signs.keys() - set(hung)):
                log.warning("%s; the others wait for as long again", self._sentence_of_hung(signs))
        self._warned = late


def _sentence(signs: Mapping[int, Sign], ranks: Sequence[int], what: str) -> str:
    named = [
        f"rank {rank} on {signs[rank].node} {what}" + (f", in {signs[rank].where}" if signs[rank].where else "")
        for rank in ranks[:_NAMED]
    ]
    return "; ".join(named) + (f"; and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")


def where() -> str:
    """The innermost line of this project that the main thread is at."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if any(file.is_relative_to(package) for package in _PACKAGES):
            return f"{file.name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
