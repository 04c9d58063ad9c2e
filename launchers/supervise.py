"""`fitv2 train --supervise`: what a chain of Slurm jobs does, on one machine: attempt after attempt, until the run is
done, was stopped, or gets no further."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from data_sharding.storage.open_store import open_store
from fitv2_scale.config.schema import Config
from fitv2_scale.run.log import newest_attempt
from fitv2_scale.run.run import BAD_INPUT, GIVE_UP, RETRY, Run
from launchers.chain_log import outcome_of, verdict
from launchers.notify import HUNG, tell, was_hung

_POLL = 0.2  # seconds
_GRACE = 10.0  # seconds that the others get when a rank has failed; they can no longer save without it
_LEAVE = 120.0  # seconds that the others get when a rank is done
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def supervise(config: Config, command: Sequence[str], processes: int) -> int:
    """Runs ``command`` as that many ranks, again and again. Returns 0, 2, 75 (it was told to stop) or 93."""
    run = _run(config)
    records = [{"kind": "SUBMIT", "log": len(run.log.entries()) if run else 0}]
    with _Signals().noted() as signals:
        while True:
            log = run.log.entries() if run else []
            before, commits = newest_attempt(log), sum(entry.kind == "COMMIT" for entry in log)
            records.append({"kind": "START", "commits": commits})
            code = _attempt(command, processes, signals)
            run = run or _run(config)
            code, reason = _outcome(run, before, code)
            log = run.log.entries() if run else []
            records.append({"kind": "END", "code": code, "reason": reason})
            outcome = verdict(records, log, config.train.steps, config.slurm.fruitless)
            if outcome.event is None and run and was_hung(run, before):
                _tell(config, HUNG, reason)
            if outcome.event is not None:
                _tell(config, outcome.event, outcome.reason)
            if outcome.event == "stopped" or signals.last is not None:
                return RETRY
            if outcome.event is not None:
                if outcome.code == GIVE_UP:
                    _say(outcome.reason)
                return outcome.code
            _say(f"{reason}: another attempt begins")


class _Signals:
    """Notes what this process is told, and tells it to the ranks."""

    def __init__(self) -> None:
        self.last: int | None = None
        self.ranks: list[subprocess.Popen] = []

    def _note(self, number: int, frame: object) -> None:
        self.last = number
        self.tell(number)

    def tell(self, number: int) -> None:
        for rank in self.ranks:
            rank.send_signal(number)

    @contextmanager
    def noted(self) -> Iterator["_Signals"]:
        before = {number: signal.signal(number, self._note) for number in _FORWARDED}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _attempt(command: Sequence[str], processes: int, signals: _Signals) -> int:
    """Runs the ranks to their end; the first that fails ends all. Returns the first exit code that is not 0, or 0."""
    port = _free_port()
    held = set(_FORWARDED)
    # Held back in the ranks from the start, until the trainer can note them; and here, so that none is missed between.
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        for rank in range(processes):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            }
            # A session of its own: Ctrl-C is forwarded, once, and not also sent by the terminal.
            signals.ranks.append(subprocess.Popen(command, env=os.environ | environment, start_new_session=True))
        if signals.last is not None:  # it came when there were no ranks to tell
            signals.tell(signals.last)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
    try:
        return _wait(signals.ranks)
    finally:
        for rank in signals.ranks:
            rank.kill()
            rank.wait()
        signals.ranks.clear()


def _wait(ranks: Sequence[subprocess.Popen]) -> int:
    deadline, failed = float("inf"), 0
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(_POLL)
        ended = [rank.returncode for rank in ranks if rank.poll() is not None]
        if not failed and any(ended):
            failed, deadline = next(filter(None, ended)), time.monotonic() + _GRACE
        elif ended and deadline == float("inf"):
            deadline = time.monotonic() + _LEAVE
    return failed or next(filter(None, (rank.returncode for rank in ranks)), 0)


def _outcome(run: Run | None, before: int, code: int) -> tuple[int, str]:
    """Of the ranks that ended with ``code``, when attempt ``before`` had been the newest."""
    if run:
        return outcome_of(run, before, code)[:2]
    if code == BAD_INPUT:
        return BAD_INPUT, "bad input"
    return RETRY, f"exit code {code} before there was a run"


def _run(config: Config) -> Run | None:
    return Run.open(config.run) if open_store(config.run).exists("run.json") else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tell(config: Config, event: str, reason: str) -> None:
    if problem := tell(config.slurm.on_event, event, open_store(config.run).url, reason):
        _say(problem)


def _say(text: str) -> None:
    print(f"fitv2: {text}", file=sys.stderr, flush=True)
