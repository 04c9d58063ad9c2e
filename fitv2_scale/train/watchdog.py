"""Notices a rank that gets no further, names it, and ends the attempt with 75; else all others would wait for ever.

A rank says what it does: load, data, step, save or evaluate, each with a limit of its own (its first steps are
``compile``). A thread of each rank tells all others so once a second, by UDP, and looks at the clock. The alarm is
raised by a rank that is longer in a section than it may, and by one that has not heard of another for as long: that
process is stopped, or its node is gone. On an alarm every rank that can writes its stacks to
attempts/<n>/logs/rank-00000.stacks, and beside it the last collectives (torch's flight recorder); the first of them
writes why to end.json and who to hung.json (nobody, if it is all alike), and all end.

    hung.json  [{"rank": 1, "node": "n7", "section": "step", "step": 1200, "seconds": 31.2, "silent": true}]
"""

import faulthandler
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from fitv2_scale.config.sections import WatchdogConfig
from fitv2_scale.parallel.world import World
from fitv2_scale.run.run import RETRY, Attempt, Run

Section = Literal["load", "data", "step", "compile", "save", "evaluate"]

_LONG_SILENCE = 300.0  # seconds
_ASLEEP = 2.0  # seconds that the watchdog's own thread was late
_NAMED = 64  # most ranks that an alarm names; it has to fit a datagram
_COMPILING = 3  # so many first steps may hold compilation
_RANKS_PER_SECOND = 128  # that a rank tells; on larger worlds each is told less often
_WRITER_GRACE, _OTHERS_GRACE = 2.0, 10.0  # seconds between stacks and end: the first that ends takes all others with it

_PACKAGES = [Path(__file__).parents[2] / name for name in ("fitv2_scale", "data_sharding")]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    node: str
    section: str
    step: int
    since: float  # seconds in this section
    patience: float  # seconds for which it may be silent now
    where: str = ""  # innermost line of this project in the main thread
    event: str = ""  # alarm, or bye: it ends as it should


@dataclass(frozen=True)
class Hung:
    """A rank that is to blame."""

    rank: int
    node: str
    section: str
    step: int
    seconds: float
    silent: bool
    where: str

    def __str__(self) -> str:
        what = "has not been heard of for" if self.silent else f"has been in section {self.section} for"
        place = f", in {self.where}" if self.where else ""
        return f"rank {self.rank} on {self.node} {what} {self.seconds:.0f} s, at step {self.step}{place}"


def blame(beats: Mapping[int, Beat], unheard: Mapping[int, float]) -> list[Hung]:
    """Who holds the others up: ranks that are silent, ``unheard`` of for longer than their patience; else those behind
    in steps; else those in another section than most, or at another line; else all, who wait for something outside."""
    silent = [b for b in beats.values() if unheard[b.rank] > b.patience]
    if silent:
        return [Hung(b.rank, b.node, b.section, b.step, unheard[b.rank], True, b.where) for b in silent]
    last = min(b.step for b in beats.values())
    guilty = [b for b in beats.values() if b.step == last]
    for trait in (lambda b: b.section, lambda b: b.where):
        if len(guilty) == len(beats):
            (usual, count), *others = Counter(map(trait, guilty)).most_common()
            if others and count > others[0][1]:
                guilty = [b for b in guilty if trait(b) != usual]
    return [Hung(b.rank, b.node, b.section, b.step, b.since, False, b.where) for b in guilty]


class Watchdog:
    """One on each rank, made by all together. ``within`` is for the main thread."""

    def __init__(self, config: WatchdogConfig, world: World, run: Run, number: int) -> None:
        self._config, self._rank, self._run, self._number = config, world.rank, run, number
        self._node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        self._section: Section = "load"
        self._since, self._step, self._compiled = time.monotonic(), 0, 0
        self._durations: deque[float] = deque(maxlen=20)
        self._interval = max(1.0, world.size / _RANKS_PER_SECOND)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("", 0))
        self._secret = world.broadcast(secrets.token_hex(8))
        mine = ((_address(), self._socket.getsockname()[1]), self._node)
        self._addresses, nodes = zip(*world.all_gather(mine), strict=True)
        others = [rank for rank in range(world.size) if rank != world.rank]
        self._beats = {rank: Beat(rank, nodes[rank], "load", 0, 0.0, config.load_seconds) for rank in others}
        self._heard = dict.fromkeys(others, time.monotonic())
        self._ended = threading.Event()

    @contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()
            self._tell("bye")
            self._socket.close()

    @contextmanager
    def within(self, section: Section, step: int | None = None) -> Iterator[None]:
        """The main thread does this now; ``step`` if another begins."""
        if step is not None:
            self._step = step
            self._compiled = self._compiled or step + _COMPILING
        before = self._section
        if section == "step" and self._step < self._compiled:
            section = "compile"
        begun = self._since = time.monotonic()
        self._section = section
        try:
            yield
        finally:
            if section == "step":
                self._durations.append(time.monotonic() - begun)
            self._since, self._section = time.monotonic(), before

    def limit(self, section: str) -> float:
        """Seconds that this rank may be in ``section``."""
        if section == "step":
            return max(self._config.step_seconds, self._config.step_factor * self.longest_step)
        return getattr(self._config, f"{section}_seconds")

    @property
    def longest_step(self) -> float:
        """Seconds, of the last ones; 0.0 before the first that compiled nothing."""
        return max(self._durations, default=0.0)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._ended.is_set():
            self._tell("")
            self._listen(self._interval)
            now = time.monotonic()
            if (asleep := now - looked - self._interval) > _ASLEEP:
                # This process was stopped, and maybe the others with it (Slurm suspends jobs): no time has passed.
                self._since += asleep
                self._heard = {rank: heard + asleep for rank, heard in self._heard.items()}
            looked = now
            if self._alarmed():
                hung = self._blame()
                self._tell("alarm", hung)
                self._end(hung)

    def _alarmed(self) -> bool:
        now = time.monotonic()
        silent = any(now - self._heard[b.rank] > b.patience for b in self._beats.values())
        return silent or now - self._since > self.limit(self._section)

    def _blame(self) -> list[Hung]:
        now = time.monotonic()
        beats = self._beats | {self._rank: self._own(float("inf"))}
        return blame(beats, {rank: now - self._heard.get(rank, now) for rank in beats})

    def _tell(self, event: str, hung: Sequence[Hung] = ()) -> None:
        section = self._section
        # Whoever waits, for data or in a collective, is heard nevertheless; a compiler may be silent for a while.
        patience = self.limit("step") if section in ("step", "data") else min(self.limit(section), _LONG_SILENCE)
        message = json.dumps([self._secret, asdict(self._own(patience, event)), [asdict(h) for h in hung[:_NAMED]]])
        for rank, address in enumerate(self._addresses):
            if rank != self._rank:
                with suppress(OSError):  # of a node that is gone; its silence will tell
                    self._socket.sendto(message.encode(), address)

    def _own(self, patience: float, event: str = "") -> Beat:
        since = time.monotonic() - self._since
        return Beat(self._rank, self._node, self._section, self._step, since, patience, _where(), event)

    def _listen(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._ended.is_set():
            self._socket.settimeout(min(left, 0.2))
            with suppress(TimeoutError, OSError, ValueError):
                secret, said, hung = json.loads(self._socket.recv(1 << 16))
                if secret == self._secret:
                    self._hear(Beat(**said), [Hung(**h) for h in hung])

    def _hear(self, beat: Beat, hung: Sequence[Hung]) -> None:
        if beat.event == "bye":
            self._beats.pop(beat.rank, None)
            return
        self._beats[beat.rank], self._heard[beat.rank] = beat, time.monotonic()
        if beat.event == "alarm":
            self._end(hung)

    def _end(self, hung: Sequence[Hung]) -> None:
        """Writes what there is to know, and ends this process. All go by what the one who raised the alarm has seen: a
        moment earlier or later it looks different."""
        self._write_stacks()
        reason = "; ".join(map(str, hung[:3])) + (f"; and {len(hung) - 3} more" if len(hung) > 3 else "")
        log.error("%s", reason)
        ranks = {self._rank, *self._beats}
        if self._rank == min(ranks - {h.rank for h in hung if h.silent}, default=None):
            with suppress(Exception):  # the storage may be what hangs
                found = [asdict(h) for h in hung] if len(hung) < min(len(ranks), _NAMED) else []
                # Once: one that was stopped, and wakes up while all are being ended, knows nothing better.
                self._run.store.create_json(f"attempts/{self._number}/hung.json", found)
                Attempt(self._number, self._run).end(RETRY, reason)
            print(reason, flush=True)
            time.sleep(_WRITER_GRACE)
        else:
            time.sleep(_OTHERS_GRACE)
        os._exit(RETRY)

    def _write_stacks(self) -> None:
        rel = f"attempts/{self._number}/logs/rank-{self._rank:05d}.stacks"
        with suppress(Exception):
            file = self._run.local_path(rel)
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "w") as stacks:
                faulthandler.dump_traceback(stacks, all_threads=True)
            self._run.upload(rel)
        with suppress(Exception):  # this part of torch is private
            for name, dump in _flight_recorders():
                rel = f"attempts/{self._number}/logs/rank-{self._rank:05d}.{name}.json"
                self._run.local_path(rel).write_bytes(dump())
                self._run.upload(rel)


def _flight_recorders() -> list[tuple[str, Callable[[], bytes]]]:
    """The last collectives that this rank began and ended, as torch has noted them: of NCCL where there is a GPU, else
    of gloo."""
    name, program = ("nccl", "_dump_nccl_trace_json") if torch.cuda.is_available() else ("gloo", "_dump_fr_trace_json")
    dump = getattr(torch._C._distributed_c10d, program, None)
    return [(name, dump)] if dump else []


def _where() -> str:
    """The innermost line of this project at which the main thread is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if any(file.is_relative_to(package) for package in _PACKAGES):
            return f"{file.name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def _address() -> str:
    """This node as others reach it: its own address on the way to the first node, which they know by name."""
    first = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((first, 9))  # sends nothing
        mine = probe.getsockname()[0]
        if not mine.startswith("127."):
            return mine
    return first
