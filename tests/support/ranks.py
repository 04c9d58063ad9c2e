"""Runs a function on several ranks: real processes, gloo, in a fifth of a second.

A forkserver imports torch and the trainer once; every rank is a fork of it. The rendezvous store lives in the test's
process, on a port that the system chose, so nothing can collide. A group that hangs is killed and fails the test.
"""

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.waiting import PATIENCE
from tests.support.waiting import wait as wait_for

_GRACE = 10.0  # seconds, between the first rank's failure and the kill of those that still run

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preloaded"])


class Ranks:
    """Ranks that run ``target(*args)``. ``results`` waits for them; ``kill`` is SIGKILL to all."""

    def __init__(self, size: int, target: Callable, *args: Any):
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes, self._pipes = [], []
        for rank in range(size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(target=_rank, args=(sender, rank, size, self._store.port, target, args))
            process.start()
            sender.close()
            self._processes.append(process)
            self._pipes.append(receiver)

    def results(self, timeout: float = PATIENCE) -> list[Any]:
        """What each rank returned. Raises the first failure, with that rank's traceback; others get a moment to end."""
        deadline, outcomes, failure = time.monotonic() + timeout, {}, None
        try:
            while len(outcomes) < len(self._pipes):
                waiting = [p for p in self._pipes if p not in outcomes]
                ready = wait(waiting, timeout=max(0, deadline - time.monotonic()))
                if not ready:
                    break
                for pipe in ready:
                    outcomes[pipe] = _receive(pipe)
                    if isinstance(outcomes[pipe], _Failure) and failure is None:
                        failure, deadline = outcomes[pipe], time.monotonic() + _GRACE
        finally:
            self.kill()
        if failure:
            raise failure.error from RuntimeError(failure.traceback)
        hanging = [rank for rank, pipe in enumerate(self._pipes) if pipe not in outcomes]
        assert not hanging, f"ranks {hanging} hang"
        return [outcomes[p] for p in self._pipes]

    def result(self, rank: int, timeout: float = PATIENCE) -> Any:
        """What one rank returned, while others may still run."""
        assert self._pipes[rank].poll(timeout), f"rank {rank} hangs"
        outcome = _receive(self._pipes[rank])
        if isinstance(outcome, _Failure):
            raise outcome.error from RuntimeError(outcome.traceback)
        return outcome

    def terminate(self, rank: int) -> None:
        self._processes[rank].terminate()

    def signal(self, rank: int, number: int) -> None:
        os.kill(self._processes[rank].pid, number)

    def wait_until_stopped(self, rank: int) -> None:
        """Until it has had SIGSTOP."""
        stat = Path(f"/proc/{self._processes[rank].pid}/stat")
        wait_for(f"rank {rank} to stop", lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "T")

    def wait_until_joined(self, rank: int) -> None:
        """Until it waits for the others."""
        wait_for(f"rank {rank} to join", lambda: self._store.check([f"fitv2/node/{rank}"]))

    def exit_code(self, rank: int, timeout: float) -> int | None:
        """Once it has ended; None if it has not in time."""
        self._processes[rank].join(timeout)
        return self._processes[rank].exitcode

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def run_ranks(size: int, target: Callable, *args: Any, timeout: float = PATIENCE) -> list[Any]:
    return Ranks(size, target, *args).results(timeout)


def in_environment(env: dict[str, str], target: Callable, *args: Any) -> Any:
    """A rank's target that needs variables of its test: the forkserver's environment is older."""
    os.environ.update(env)
    return target(*args)


class _Failure:
    def __init__(self, error: BaseException, text: str):
        self.error, self.traceback = error, text


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return _Failure(RuntimeError("a rank died without a word"), "")


def _rank(pipe: Connection, rank: int, size: int, port: int, target: Callable, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the store is the parent's, as under torchrun
    )
    torch.set_num_threads(1)
    gc.freeze()  # collections pass over what all ranks have in common
    try:
        pipe.send(target(*args))
    except BaseException as error:
        pipe.send(_Failure(error, traceback.format_exc()))
