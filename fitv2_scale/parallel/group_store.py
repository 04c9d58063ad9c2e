"""The store of the process group: a small server on rank 0 or in torchrun's agent, where each rank can leave a word."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from data_sharding.errors import RanksMissing
from data_sharding.launched import speaks_for_node

T = TypeVar("T")

ANSWER = 10.0  # seconds in which it does what does not wait
SOON = 5.0  # seconds after which a rank says whom it waits for
_POLL, _LONGEST_POLL = 0.002, 0.5  # seconds
_LOOK, _MOMENT = 0.2, 0.5  # seconds, between looks for a signal; that a wait may still take once one has come
_REACHED = 2.0  # seconds for a connection
_TALKATIVE = 8  # ranks that say so, and the first of each node: not each of a thousand

log = logging.getLogger(__name__)

Noted = Callable[[], str | None]  # the signal that asks this process to end, None if there is none


def open_group_store(rank: int, size: int, patience: float, noted: Noted) -> dist.TCPStore:
    """Opens it as torch's rendezvous does, but waits for its server alone, not for the other ranks.

    Raises:
        RanksMissing: the server has not answered for ``patience`` seconds, or until a signal was ``noted``.
        DistError: this rank is to be the server and cannot.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=patience / 2)  # it tries twice for so long
    in_agent = not served_by_rank0()
    serves = rank == 0 and not in_agent

    def open_it() -> dist.TCPStore:
        return dist.TCPStore(host, port, size, serves, limit, wait_for_workers=False, multi_tenant=not in_agent)

    if serves:
        return open_it()
    server = "torchrun's agent" if in_agent else "rank 0"
    waits = threading.Timer(SOON, log.warning, ("rank %d waits for %s at %s:%d", rank, server, host, port))
    waits.daemon = True
    if rank < _TALKATIVE or speaks_for_node(os.environ):
        waits.start()
    try:
        # Not in torch's constructor: a thread that is left in it would abort the process when that ends.
        if stop := _listens(host, port, patience, noted):
            raise RanksMissing(
                f"{stop} came while rank {rank} waited for {server} at {host}:{port}: nothing is lost, start again"
            )
        return in_time(open_it, 2 * patience)
    except (dist.DistError, TimeoutError) as error:
        raise RanksMissing(
            f"rank {rank} has not reached {server} at {host}:{port} for {patience:.0f} s: see whether its process was "
            "started, what it waits for, and whether its node can be reached; then start again"
        ) from error
    finally:
        waits.cancel()


def _listens(host: str, port: int, patience: float, noted: Noted) -> str | None:
    """Waits until something does at that port; or gives the signal that is ``noted`` before. Raises TimeoutError."""
    until, pause = time.monotonic() + patience, 10 * _POLL
    while True:
        with suppress(OSError), socket.create_connection((host, port), timeout=_REACHED):
            return None
        if stop := noted():
            return stop
        if time.monotonic() > until:
            raise TimeoutError(f"nothing listens at {host}:{port}")
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_POLL)


def served_by_rank0() -> bool:
    """Rather than by torchrun's agent, which outlives a rank."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def reopened(store: dist.Store) -> dist.Store:
    """A connection of its own, for another thread: on one connection, an operation that waits keeps others waiting."""
    assert isinstance(store, dist.TCPStore)
    return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)


def appears(store: dist.Store, key: str, seconds: float) -> bool:
    """Whether ``key`` is there, as soon as it is. (When ``Store.wait`` gives up, torch prints that as an error.)"""
    until, pause = time.monotonic() + seconds, _POLL
    while not store.check([key]):
        if time.monotonic() > until:
            return False
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_POLL)
    return True


def in_time(
    act: Callable[[], T], seconds: float, noted: Noted = lambda: None, give_up: Callable[[str], object] = lambda _: None
) -> T:
    """What ``act`` returns or raises. Raises TimeoutError if it takes longer than ``seconds``: a store's own limits do
    not hold while the process of its server is stopped. Soon after a signal is ``noted``, ``give_up`` is called with
    it, on which ``act`` has to end."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(act())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="store", daemon=True)
    thread.start()
    until, stop = time.monotonic() + seconds, None
    while thread.is_alive() and (left := until - time.monotonic()) > 0:
        if stop is None and (stop := noted()):
            thread.join(_MOMENT)
            if thread.is_alive():
                give_up(stop)
                until = min(until, time.monotonic() + ANSWER)
        thread.join(min(left, _LOOK))
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer for {seconds:g} s")
    return results[0]
