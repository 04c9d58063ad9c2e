"""Whole files, local or on an object store; and any other call of a file system, with retries."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from data_sharding.errors import StorageDown, UserError
from data_sharding.storage.atomic_write import atomic_write
from data_sharding.storage.filesystems import file_system, is_local
from data_sharding.storage.retry import RetriesExhausted, RetryPolicy, call_with_retry

_WHOLE_FILE = RetryPolicy(deadline=120, attempt=40, retry_refused=False)  # takes longer than a frame
_CALL = RetryPolicy(deadline=120, attempt=40)  # an attempt reads up to 32 MB


def put(url: str, data: bytes) -> None:
    """Writes a whole file; no reader ever sees part of it: a rename locally, one put on an object store.

    Raises StorageDown if the store cannot be reached, UserError if it refuses.
    """
    fs, path = file_system(url)
    if not is_local(fs):
        _with_retry(_WHOLE_FILE, url, "pipe_file", data)
        return
    fs.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path, durable=True) as file:
        file.write(data)


def read(url: str, deadline: float = _WHOLE_FILE.deadline) -> bytes:
    """A whole file, retried until ``deadline`` (seconds). Raises FileNotFoundError, and as ``put``."""
    return _with_retry(replace(_WHOLE_FILE, deadline=deadline), url, "cat_file")


def fs_call(url: str, method: str, check: Callable[[Any], Any] = lambda result: result, **options) -> Any:
    """``check(result)`` of the file system's ``method`` on the path of ``url``, with retries.

    Raises StorageDown, the method's own error if it is permanent, and CorruptRead if ``check`` keeps raising it.
    """
    try:
        return call_with_retry(_CALL, url, method, check=check, **options)
    except RetriesExhausted as error:
        raise StorageDown(f"{url} cannot be reached: {error}; check the storage, then run the command again") from error


def exists(url: str) -> bool:
    """Whether there is a file or folder at ``url`` now. Raises as ``fs_call``."""
    file_system(url)[0].invalidate_cache()
    return fs_call(url, "exists")


def _with_retry(policy: RetryPolicy, url: str, method: str, *args):
    try:
        return call_with_retry(policy, url, method, *args, check=lambda result: result)
    except RetriesExhausted as error:
        raise StorageDown(f"{url} cannot be reached: {error}; check AWS_ENDPOINT_URL and the storage") from error
    except PermissionError as error:
        raise UserError(f"access to {url} is refused ({error}): check the credentials and their permissions") from error
