"""Detects hung ranks, reports them and exits 75, so that the others do not wait forever.

Each rank is in a phase: load, data, step, save or evaluate, each with its own time limit (its first steps are
``compile``). A thread of each rank sends the phase to all others once a second, by UDP, and checks the clock. A rank
raises the alarm when it has been in a phase for longer than the limit, or has not heard from another rank for that
long: then that process is stopped, or its node is gone. On an alarm every rank that can writes its stacks to
attempts/<n>/logs/rank-00000.stacks, and beside them its last collectives (torch's flight recorder); the first of them
writes the reason to end.json and the hung ranks to hung.json (none, if all ranks look the same); then all exit.

    hung.json  [{"rank": 1, "node": "n7", "section": "step", "step": 1200, "seconds": 31.2, "silent": true}]
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from fitv2_scale.config.sections import WatchdogConfig
from fitv2_scale.parallel.failures import RankLost, is_broken_collective
from fitv2_scale.parallel.presence import Progress, waited_for, where
from fitv2_scale.parallel.world import World, set_group_timeouts
from fitv2_scale.run.run import RETRY, Attempt
from fitv2_scale.train.lost_ranks import lost, refusing
from fitv2_scale.train.stacks import write_stacks

Phase = Literal["load", "data", "step", "compile", "save", "evaluate"]

_BEYOND_LIMITS = 2.0  # a group waits for this many times the longest limit
_LONG_SILENCE = 300.0  # seconds
_ASLEEP = 2.0  # seconds by which the watchdog's own thread must be late to count as suspended
_NAMED = 64  # ranks that an alarm names at most: it has to fit into a datagram
_COMPILING = 3  # first steps that may include compilation
_RANKS_PER_SECOND = 128  # to which a rank sends; in larger worlds it sends to each of them less often
_WRITER_GRACE, _OTHERS_GRACE = 2.0, 10.0  # seconds between stacks and exit: the first exit ends all ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beat:
    """What a rank sends about itself."""

    rank: int
    node: str
    phase: str
    step: int
    since: float  # seconds in this phase
    patience: float  # seconds for which it may be silent now
    where: str = ""  # innermost line of this project in the main thread
    event: str = ""  # "alarm"; or "bye": it exits as it should
    begun: Mapping[str, int] = field(default_factory=dict)  # collectives, by group
    still: float = 0.0  # seconds in which it has begun no more of them


@dataclass(frozen=True)
class Hung:
    """A hung rank."""

    rank: int
    node: str
    phase: str
    step: int
    seconds: float
    silent: bool
    where: str

    def __str__(self) -> str:
        what = "has not been heard from for" if self.silent else f"has been in phase {self.phase} for"
        place = f", in {self.where}" if self.where else ""
        return f"rank {self.rank} on {self.node} {what} {self.seconds:.0f} s, at step {self.step}{place}"

    def record(self) -> dict[str, Any]:
        """As hung.json holds it."""
        fields = asdict(self)
        return {"section" if name == "phase" else name: value for name, value in fields.items()}


def find_hung(beats: Mapping[int, Beat], unheard: Mapping[int, float]) -> list[Hung]:
    """The ranks that the others wait for, from the last beat of each rank and the seconds for which it was ``unheard``:
    ranks that are silent for longer than their patience; else those whose collectives the others wait for; else those
    behind in steps; else those in another phase than most, or at another line; else all, because they wait for
    something outside."""
    silent = [b for b in beats.values() if unheard[b.rank] > b.patience]
    if silent:
        return [Hung(b.rank, b.node, b.phase, b.step, unheard[b.rank], True, b.where) for b in silent]
    # Beats come at different times; only if there is one when all stood still, they can be compared.
    at_once = min(unheard[b.rank] + b.still for b in beats.values()) > max(unheard[b.rank] for b in beats.values())
    late = waited_for({b.rank: b.begun for b in beats.values()}) if at_once else []
    last = min(b.step for b in beats.values())
    suspects = [b for b in beats.values() if (b.rank in late if late else b.step == last)]
    for trait in (lambda b: b.phase, lambda b: b.where):
        if len(suspects) == len(beats):
            (usual, count), *others = Counter(map(trait, suspects)).most_common()
            if others and count > others[0][1]:
                suspects = [b for b in suspects if trait(b) != usual]
    return [Hung(b.rank, b.node, b.phase, b.step, b.since, False, b.where) for b in suspects]


def writer_of(ranks: Set[int], hung: Sequence[Hung]) -> int | None:
    """The rank that writes the end: one that does not hang, since one that does may be stopped though the alarm came
    before its silence was noticed; if all do, one that is heard. None if there is none."""
    sound = ranks - {h.rank for h in hung} or ranks - {h.rank for h in hung if h.silent}
    return min(sound, default=None)


class Watchdog:
    """One on each rank; all ranks make theirs together. ``within`` is for the main thread."""

    def __init__(self, config: WatchdogConfig, world: World, attempt: Attempt) -> None:
        self._config, self._rank, self._device, self._attempt = config, world.rank, world.device, attempt
        self._node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        self._phase: Phase = "load"
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
        self._progress = Progress()
        self._looked = 0.0  # when this rank last looked at the clock
        self.cover_groups()
        world.presence.hand_over()

    @contextmanager
    def watching(self) -> Generator["Watchdog"]:
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        except RuntimeError as error:
            if is_broken_collective(error) and (found := self._lost_ranks()):
                raise found from error
            raise
        finally:
            self._ended.set()
            thread.join()
            self._tell("bye")
            self._socket.close()

    @contextmanager
    def within(self, phase: Phase, step: int | None = None) -> Generator[None]:
        """The main thread is in ``phase`` inside; ``step`` is given where a step starts."""
        if step is not None:
            self._step = step
            self._compiled = self._compiled or step + _COMPILING
        before = self._phase
        if phase == "step" and self._step < self._compiled:
            phase = "compile"
        begun = self._since = time.monotonic()
        self._phase = phase
        try:
            yield
        finally:
            if phase == "step":
                self._durations.append(time.monotonic() - begun)
            self._since, self._phase = time.monotonic(), before

    def limit(self, phase: str) -> float:
        """Seconds that this rank may be in ``phase``."""
        if phase == "step":
            return max(self._config.step_seconds, self._config.step_factor * self.longest_step)
        return getattr(self._config, f"{phase}_seconds")

    @property
    def longest_step(self) -> float:
        """Seconds, among the last ones; 0.0 before the first without compilation."""
        return max(self._durations, default=0.0)

    def cover_groups(self) -> None:
        """Lets all groups of processes wait for longer than a rank may be in any phase: else they would break before
        the alarm can name who hangs. To be called again once there are more groups."""
        limits = [self._config.step_factor * self._config.compile_seconds, *map(self.limit, get_args(Phase))]
        set_group_timeouts(_BEYOND_LIMITS * max(limits))

    def _lost_ranks(self) -> RankLost | None:
        """Names the ranks that have ended without leaving the watch, if there are any."""
        closed = refusing(lambda: {rank: self._addresses[rank] for rank in list(self._beats)})
        nodes = {rank: beat.node for rank in closed if (beat := self._beats.get(rank))}
        return lost(nodes, self._attempt.folder / "logs") if nodes else None

    def _watch(self) -> None:
        self._looked = time.monotonic()
        while not self._ended.is_set():
            try:
                self._look()
            except Exception as error:  # this thread has to live
                log.exception("the watchdog failed: %r", error)
                self._ended.wait(self._interval)

    def _look(self) -> None:
        self._tell("")
        self._listen(self._interval)
        now = time.monotonic()
        if (asleep := now - self._looked - self._interval) > _ASLEEP:
            # This process was suspended, perhaps with the others (Slurm suspends jobs): that time does not count.
            self._since += asleep
            self._heard = {rank: heard + asleep for rank, heard in self._heard.items()}
        self._looked = now
        if self._alarmed():
            hung = self._find_hung()
            self._tell("alarm", hung)
            self._end(hung)

    def _alarmed(self) -> bool:
        now = time.monotonic()
        silent = any(now - self._heard[b.rank] > b.patience for b in self._beats.values())
        return silent or now - self._since > self.limit(self._phase)

    def _find_hung(self) -> list[Hung]:
        now = time.monotonic()
        beats = self._beats | {self._rank: self._own(float("inf"))}
        return find_hung(beats, {rank: now - self._heard.get(rank, now) for rank in beats})

    def _tell(self, event: str, hung: Sequence[Hung] = ()) -> None:
        phase = self._phase
        # A rank that waits, for data or in a collective, still sends; one that compiles may be silent for a while.
        patience = self.limit("step") if phase in ("step", "data") else min(self.limit(phase), _LONG_SILENCE)
        message = json.dumps([self._secret, asdict(self._own(patience, event)), [asdict(h) for h in hung[:_NAMED]]])
        for rank, address in enumerate(self._addresses):
            if rank != self._rank:
                with suppress(OSError):  # its node is gone; its silence will show that
                    self._socket.sendto(message.encode(), address)

    def _own(self, patience: float, event: str = "") -> Beat:
        since = time.monotonic() - self._since
        return Beat(
            self._rank, self._node, self._phase, self._step, since, patience, where(), event, *self._progress.look()
        )

    def _listen(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._ended.is_set():
            self._socket.settimeout(min(left, 0.2))
            with suppress(TimeoutError, OSError, ValueError, TypeError):  # anybody may send something
                secret, beat, hung = json.loads(self._socket.recv(1 << 16))
                if secret == self._secret:
                    self._hear(Beat(**beat), [Hung(**h) for h in hung])

    def _hear(self, beat: Beat, hung: Sequence[Hung]) -> None:
        if beat.event == "bye":
            self._beats.pop(beat.rank, None)
            return
        self._beats[beat.rank], self._heard[beat.rank] = beat, time.monotonic()
        if beat.event == "alarm":
            self._end(hung)

    def _end(self, hung: Sequence[Hung]) -> None:
        """Writes stacks and reason, and exits. All ranks use what the rank that raised the alarm has seen: a moment
        earlier or later it looks different."""
        write_stacks(self._attempt, self._rank, self._device)
        reason = "; ".join(map(str, hung[:3])) + (f"; and {len(hung) - 3} more" if len(hung) > 3 else "")
        log.error("%s", reason)
        ranks = {self._rank, *self._beats}
        if self._rank == writer_of(ranks, hung):
            with suppress(Exception):  # the storage may be what hangs
                found = [h.record() for h in hung] if len(hung) < min(len(ranks), _NAMED) else []
                # Created once: a rank that was stopped, and wakes up while all are being ended, must not overwrite it.
                self._attempt.run.store.create_json(f"{self._attempt.path}/hung.json", found)
                self._attempt.end(RETRY, reason)
            print(reason, flush=True)
            time.sleep(_WRITER_GRACE)
        else:
            time.sleep(_OTHERS_GRACE)
        os._exit(RETRY)


def _address() -> str:
    """This node's address as others reach it: the one that it has on the way to the first node."""
    first = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((first, 9))  # sends nothing
        mine = probe.getsockname()[0]
        if not mine.startswith("127."):
            return mine
    return first
