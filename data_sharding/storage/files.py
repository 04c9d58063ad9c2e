"""Whole files, local or on an object store; and any other call of a file system, with retries."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from data_sharding.errors import UserError
from data_sharding.storage.atomic_write import atomic_write
from data_sharding.storage.failures import failure, refused, unreachable
from data_sharding.storage.filesystems import file_system, is_local
from data_sharding.storage.retry import RetriesExhausted, RetryPolicy, call_with_retry, retry_local

Result = TypeVar("Result")

_WHOLE_FILE = RetryPolicy(deadline=120, attempt=40, retry_refused=False)  # takes longer than a frame
_CALL = RetryPolicy(deadline=120, attempt=40)  # an attempt reads up to 32 MB
_TRIES = 5  # of a local write: a task that begins or ends removes the unfinished files of all
_LOCAL = replace(_CALL, retry_refused=False)  # permissions of a mounted file system are no passing trouble at first


def put(url: str, data: bytes) -> None:
    """Writes a whole file; no reader ever sees part of it: a rename locally, one put on an object store.

    Raises StorageDown if the store cannot be reached or is full, UserError if it refuses or the bucket does not exist.
    """
    fs, path = file_system(url)
    try:
        if is_local(fs):
            with_local(url, lambda: _write(path, data), writing=True)
        else:
            _with_retry(_WHOLE_FILE, url, "pipe_file", data)
    except FileNotFoundError as error:
        cause = f"its folder cannot be made ({error})" if is_local(fs) else "there is no such bucket; create it first"
        raise UserError(f"{url} cannot be written: {cause}") from error


def read(url: str, deadline: float | None = None) -> bytes:
    """A whole file, retried until ``deadline`` (seconds). Raises FileNotFoundError, and as ``put``."""
    return _with_retry(replace(_WHOLE_FILE, deadline=deadline or _WHOLE_FILE.deadline), url, "cat_file")


def fs_call(url: str, method: str, check: Callable[[Any], Any] = lambda result: result, **options) -> Any:
    """``check(result)`` of the file system's ``method`` on the path of ``url``, with retries.

    Raises FileNotFoundError; StorageDown; UserError if access is refused or the path cannot be one; CorruptRead if
    ``check`` keeps raising it.
    """
    policy = _LOCAL if is_local(file_system(url)[0]) else _CALL
    return _with_retry(policy, url, method, check=check, **options)


def exists(url: str) -> bool:
    """Whether there is a file or folder at ``url`` now. Raises as ``fs_call``."""
    fs, path = file_system(url)
    if is_local(fs):  # its own method takes every error for "no"
        try:
            with_local(url, lambda: os.stat(path))
        except FileNotFoundError:
            return False
        return True
    fs.invalidate_cache()
    return fs_call(url, "exists")


def with_local(url: str, act: Callable[[], Result], writing: bool = False) -> Result:
    """``act()`` on a local file at ``url``, retried. Raises as ``fs_call``."""
    return _as_sentences(url, True, lambda: retry_local(_LOCAL, url, act, writing))


def _write(path: str, data: bytes) -> None:
    for tries_left in range(_TRIES - 1, -1, -1):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with atomic_write(path, durable=True) as file:
                file.write(data)
            return
        except FileNotFoundError:
            if not tries_left:
                raise


def _with_retry(policy: RetryPolicy, url: str, method: str, *args, check=lambda result: result, **options):
    local = is_local(file_system(url)[0])
    return _as_sentences(url, local, lambda: call_with_retry(policy, url, method, *args, check=check, **options))


def _as_sentences(url: str, local: bool, act: Callable[[], Result]) -> Result:
    """``act()``, whose errors of the storage become sentences; those that callers look at stay as they are."""
    try:
        return act()
    except RetriesExhausted as error:
        raise unreachable(url, error, local) from error
    except NotADirectoryError as error:
        raise FileNotFoundError(str(error)) from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise failure(url, error) if local else refused(url, error) from error
