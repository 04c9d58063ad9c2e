"""The store of the process group: a small server on rank 0 or in torchrun's agent, where each rank can leave a word."""

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from data_sharding.errors import RanksMissing

T = TypeVar("T")

ANSWER = 10.0  # seconds in which it does what does not wait
_POLL, _LONGEST_POLL = 0.002, 0.5  # seconds


def open_group_store(rank: int, size: int, patience: float) -> dist.TCPStore:
    """Opens it as torch's rendezvous does, but waits for its server alone, not for the other ranks.

    Raises:
        RanksMissing: the server has not answered for ``patience`` seconds.
        DistError: this rank is to be the server and cannot.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=patience / 2)  # it tries twice for so long
    in_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not in_agent

    def open_it() -> dist.TCPStore:
        return dist.TCPStore(host, port, size, serves, limit, wait_for_workers=False, multi_tenant=not in_agent)

    if serves:
        return open_it()
    try:
        return in_time(open_it, 2 * patience)
    except (dist.DistError, TimeoutError) as error:
        server = "torchrun's agent" if in_agent else "rank 0"
        raise RanksMissing(
            f"rank {rank} has not reached {server} at {host}:{port} for {patience:.0f} s: see whether its process was "
            "started, what it waits for, and whether its node can be reached; then start again"
        ) from error


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


def in_time(act: Callable[[], T], seconds: float) -> T:
    """What ``act`` returns or raises. Raises TimeoutError if it takes longer than ``seconds``: a store's own limits do
    not hold while the process of its server is stopped."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(act())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="store", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer for {seconds:g} s")
    return results[0]
