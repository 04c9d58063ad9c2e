"""File systems by URL, and one attempt at a read or write of them, bounded in time.

``s3://`` is s3fs, with the usual chain of credentials, AWS_ENDPOINT_URL and AWS_REGION. Its own retries are off: s3fs
and botocore both retry, which multiplies (30 requests and 90 s, measured, until a 503 comes through), and neither knows
our deadline or our digests. ``retry.py`` is the one place that retries.

s3fs runs an event loop in a thread of its own: a process that has used it must not fork.
"""

import asyncio
import inspect
import os
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from data_sharding.errors import UserError

_CONNECTIONS = 64  # of one process; more readers than that would wait for one another
_POLL = 0.1  # seconds until a waiting attempt notices that it was cancelled


class Cancelled(Exception):
    """The caller no longer wants the result: not an error of the storage."""


def file_system(url: str, *, instead_of: AbstractFileSystem | None = None) -> tuple[AbstractFileSystem, str]:
    """The file system of ``url``, and the path in it. One S3 connection serves all threads of the process.

    ``instead_of`` is a file system that was refused: the new one logs in again, with the credentials that are on disk
    now.

    Raises:
        UserError: the URL's protocol is unknown, or needs a package that is not installed.
    """
    protocol = url.partition("://")[0]
    try:
        # url_to_fs would cut the name of a local file at "::" and read another one
        if protocol in (url, "file") or url.startswith("/"):
            fs = fsspec.filesystem("file")
            return fs, str(fs._strip_protocol(url))
        if protocol not in ("s3", "s3a"):
            return fsspec.core.url_to_fs(url)
        key = (protocol, os.getpid())
        with _lock:
            if key not in _connected or _connected[key] is instead_of:
                # skip_instance_cache: fsspec would make one instance, with its own login, for every thread.
                fs = fsspec.filesystem(protocol, config_kwargs=_BOTO_CONFIG, skip_instance_cache=True)
                fs.retries = 1  # how often s3fs tries one request
                _connected[key] = fs
            return _connected[key], str(_connected[key]._strip_protocol(url))  # of a list it returns a list
    except ImportError as error:
        raise UserError(f"{url} needs a package that is not installed ({error}): pip install -e '.[s3]'") from error
    except ValueError as error:  # fsspec's "Protocol not known: x"
        raise UserError(f"{url} cannot be opened ({error}): give a local path or an s3:// URL") from error


def disconnect() -> None:
    """Forgets all connections: the next ones see another endpoint or other credentials in the environment."""
    with _lock:
        _connected.clear()


# One connection per process and protocol, shared by its threads: each has its own login, pool and event loop.
_lock = threading.Lock()
_connected: dict[tuple[str, int], AbstractFileSystem] = {}
_BOTO_CONFIG = {
    "retries": {"total_max_attempts": 1, "mode": "standard"},
    "connect_timeout": 10,
    "read_timeout": 60,  # an attempt's own limit is shorter; this one frees a connection that nobody waits for
    "max_pool_connections": _CONNECTIONS,
    # Ceph and others neither check nor return the checksums that boto3 sends by default since 1.36.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}


def refuse_pipe(path: str) -> None:
    """Raises UserError if the local ``path`` is a pipe: its reader may wait for ever, and cannot read it twice."""
    with suppress(OSError):  # the read itself will say it
        if Path(path).is_fifo():
            raise UserError(f"{path} is a pipe: give a file")


def is_local(fs: AbstractFileSystem) -> bool:
    """Whether ``fs`` is a disk of this machine, or a network file system that is mounted."""
    return isinstance(fs, LocalFileSystem)


Method = str | Callable[..., Awaitable[Any]]  # of a file system, or a coroutine function that is given one


def attempt(
    fs: AbstractFileSystem,
    method: Method,
    *args: Any,
    seconds: float,
    cancelled: threading.Event | None = None,
    waiting: Callable[[], None] = lambda: None,
    **kw: Any,
) -> Any:
    """Calls ``fs.method`` once. A remote call ends after ``seconds``, even if bytes still arrive slowly; meanwhile
    ``waiting`` is called again and again.

    Raises what the method raises; TimeoutError; Cancelled as soon as ``cancelled`` is set.
    """
    if isinstance(method, str) and not _is_async(fs, method):
        return getattr(fs, method)(*args, **kw)
    assert isinstance(fs, AsyncFileSystem) and fs.loop is not None, f"{type(fs).__name__} has no event loop"
    coroutine = getattr(fs, f"_{method}") if isinstance(method, str) else partial(method, fs)
    future: Future = asyncio.run_coroutine_threadsafe(coroutine(*args, **kw), fs.loop)
    deadline = time.monotonic() + seconds
    while not wait([future], timeout=_POLL if cancelled else seconds).done:
        waiting()
        unwanted = cancelled is not None and cancelled.is_set()
        if unwanted or time.monotonic() >= deadline:
            future.cancel()
            raise Cancelled if unwanted else TimeoutError(f"no answer within {seconds:.0f} s")
    return future.result()


def _is_async(fs: AbstractFileSystem, method: str) -> bool:
    return isinstance(fs, AsyncFileSystem) and inspect.iscoroutinefunction(getattr(fs, f"_{method}", None))
