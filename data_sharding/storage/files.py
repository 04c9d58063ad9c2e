"""Whole files, local or on an object store: written so that no reader sees a part, read in one go."""

import os
from dataclasses import replace

from data_sharding.errors import StorageDown, UserError
from data_sharding.storage.atomic_write import atomic_write
from data_sharding.storage.filesystems import file_system, is_local
from data_sharding.storage.retry import RetriesExhausted, RetryPolicy, call_with_retry

_START = RetryPolicy(deadline=120, attempt=40, retry_refused=False)  # whole files take longer than frames


def put(url: str, data: bytes) -> None:
    """Writes a whole file that no reader ever sees in part: a rename locally, one put on an object store.

    Raises StorageDown if the store cannot be reached, UserError if it refuses.
    """
    fs, path = file_system(url)
    if not is_local(fs):
        _with_retry(_START, url, "pipe_file", data)
        return
    fs.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path, durable=True) as file:
        file.write(data)


def read(url: str, deadline: float = _START.deadline) -> bytes:
    """A whole file, retried until ``deadline`` (seconds). Raises FileNotFoundError, and as ``put``."""
    return _with_retry(replace(_START, deadline=deadline), url, "cat_file")


def _with_retry(policy: RetryPolicy, url: str, method: str, *args):
    try:
        return call_with_retry(policy, url, method, *args, check=lambda result: result)
    except RetriesExhausted as error:
        raise StorageDown(f"{url} cannot be reached: {error}; check AWS_ENDPOINT_URL and the storage") from error
    except PermissionError as error:
        raise UserError(f"access to {url} is refused ({error}): check the credentials and their permissions") from error
