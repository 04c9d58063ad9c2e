"""`fitv2 train --supervise`: what a chain of Slurm jobs does, on one machine. It starts attempt after attempt until the
run is done, is stopped, or makes no progress."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from data_sharding.standard_streams import dropping
from data_sharding.storage.open_store import open_store
from fitv2_scale.config.schema import Config
from fitv2_scale.run.log import newest_attempt
from fitv2_scale.run.run import BAD_INPUT, GIVE_UP, RETRY, Attempt, Run
from fitv2_scale.run.stop_signals import STOP_SIGNALS, SUPERVISED, noted_signals
from launchers.chain_log import Record, outcome_of, verdict
from launchers.notify import HUNG, run_event_command, was_hung

_POLL = 0.2  # seconds
# What comes from outside of a rank, whatever the others met then.
_KILLED = {
    signal.SIGKILL: "was killed (SIGKILL; out of memory?)",
    signal.SIGBUS: "died of SIGBUS: a mapped file could not be read; check the storage of the dataset",
}
_AFTER_FAILURE = 10.0  # seconds for the others to end when a rank has failed; they cannot save without it
_SAID = "what the ranks have printed"
_AFTER_SUCCESS = 120.0  # seconds for the others to end when a rank is done


def supervise(config: Config, command: Sequence[str], processes: int) -> int:
    """Runs ``command`` as that many ranks, again and again. Returns 0, 2, 75 (it got a signal or a STOP) or 93."""
    run = _open_run(config)
    records: list[Record] = [{"kind": "SUBMIT", "log": len(run.log.entries()) if run else 0}]
    with dropping(), forwarded_signals() as signals:
        while True:
            log = run.log.entries() if run else []
            before, commits = newest_attempt(log), sum(entry.kind == "COMMIT" for entry in log)
            records.append({"kind": "START", "commits": commits})
            ended = run_processes(command, processes, signals)
            run = run or _open_run(config)
            code, reason = _outcome(run, before, ended)
            log = run.log.entries() if run else []
            records.append({"kind": "END", "code": code, "reason": reason})
            decision = verdict(records, log, config.train.steps, config.slurm.fruitless)
            if decision.event is None and run and was_hung(run, before):
                _notify(config, HUNG, reason)
            if decision.event is not None:
                _notify(config, decision.event, decision.reason)
            if decision.event == "stopped" or (decision.event is None and signals.last is not None):
                return RETRY
            if decision.event is not None:
                if decision.code == GIVE_UP:
                    _print(decision.reason)
                return decision.code
            _print(f"{reason}: another attempt starts")


class Ended(NamedTuple):
    """How the ranks of an attempt ended."""

    code: int  # the first exit code that is not 0, or 0
    killed: str = ""  # the rank that died of a signal first, and of which
    first: int = 0  # process id of rank 0


class Signals:
    """Forwards the signals that this process receives to the ranks that run."""

    def __init__(self, received: int | None = None) -> None:
        self.last = received  # the last signal, None if there was none
        self._ranks: Sequence[subprocess.Popen] = ()

    def receive(self, number: int, frame: object = None) -> None:
        """A handler for ``signal.signal``."""
        self.last = number
        self._forward()

    @contextmanager
    def forwarded_to(self, ranks: Sequence[subprocess.Popen]) -> Generator[None]:
        """Forwards to ``ranks`` what is received, and at once what was received before they started."""
        self._ranks = ranks
        self._forward()
        try:
            yield
        finally:
            self._ranks = ()

    def _forward(self) -> None:
        if self.last is not None:
            for rank in self._ranks:
                rank.send_signal(self.last)


@contextmanager
def forwarded_signals() -> Generator[Signals]:
    signals = Signals()
    handlers = {number: signal.signal(number, signals.receive) for number in noted_signals()}
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_processes(command: Sequence[str], processes: int, signals: Signals) -> Ended:
    """Runs the ranks to their end; the first that fails ends all."""
    ranks: list[subprocess.Popen] = []
    port = _free_port()
    # Blocked in the ranks from their start, until the trainer has handlers; and here, until all ranks have started, so
    # that a signal reaches all of them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        for rank in range(processes):
            # In a session of its own: Ctrl-C is forwarded, once, and not also sent by the terminal.
            environment = os.environ | _environment(rank, processes, port)
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
        with signals.forwarded_to(ranks):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            return _wait(ranks)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # if a rank could not be started
        for rank in ranks:
            rank.kill()
            rank.wait()


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """torchrun's variables."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        SUPERVISED: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def _wait(ranks: Sequence[subprocess.Popen]) -> Ended:
    deadline, failed, killed = float("inf"), 0, ""
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(_POLL)
        ended = [rank.returncode for rank in ranks if rank.poll() is not None]
        if not failed and any(ended):
            failed, deadline = next(filter(None, ended)), time.monotonic() + _AFTER_FAILURE
            killed = _killed([rank.returncode for rank in ranks])
        elif ended and deadline == float("inf"):
            deadline = time.monotonic() + _AFTER_SUCCESS
    code = failed or next(filter(None, (rank.returncode for rank in ranks)), 0)
    return Ended(code, killed, ranks[0].pid)


def _killed(codes: Sequence[int | None]) -> str:
    """The rank that has died of a signal, and of which, from the exit codes of all when the first had failed. Empty if
    none has; or if one has failed by itself, since others may then abort."""
    died = {rank: signal.Signals(-code) for rank, code in enumerate(codes) if code is not None and code < 0}
    for rank, number in died.items():
        if number in _KILLED:
            return f"rank {rank} {_KILLED[number]}"
    if any(code is not None and code > 0 for code in codes):
        return ""
    return next((f"rank {rank} died of {number.name}" for rank, number in died.items()), "")


def _outcome(run: Run | None, before: int, ended: Ended) -> tuple[int, str]:
    """Code and reason of ranks that have ended; ``before`` was the newest attempt when they started. A killed rank is
    the reason for what the others met: this alone knows it, so it is written to the attempt's end.json."""
    if run:
        code, reason, clean = outcome_of(run, before, ended.code, _SAID)
        if not ended.killed or clean:
            return code, reason
        newest = newest_attempt(run.log.entries())
        attempt = Attempt(newest, run)
        if newest > before and attempt.claimed_by == (socket.gethostname(), ended.first):
            attempt.end(code, ended.killed)
        return code, ended.killed
    if ended.code == BAD_INPUT:
        return BAD_INPUT, f"bad input, see {_SAID}"
    return RETRY, f"{ended.killed or f'exit code {ended.code}'} before the run was created"


def _open_run(config: Config) -> Run | None:
    return Run.open(config.run) if open_store(config.run).exists("run.json") else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _notify(config: Config, event: str, reason: str) -> None:
    if problem := run_event_command(config.slurm.on_event, event, open_store(config.run).url, reason):
        _print(problem)


def _print(text: str) -> None:
    print(f"fitv2: {text}", file=sys.stderr, flush=True)
