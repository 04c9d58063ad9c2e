"""Whole files, local or on an object store; and any other call of a file system, with retries."""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from data_sharding.errors import UserError
from data_sharding.storage.atomic_write import NoHardLinks, atomic_create, atomic_write
from data_sharding.storage.failures import failure, refused, unreachable
from data_sharding.storage.filesystems import file_system, is_local
from data_sharding.storage.open_store import open_store
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
    with _place_missing(url):
        if is_local(fs):
            with_local(url, lambda: _write(path, data), writing=True)
        else:
            _with_retry(_WHOLE_FILE, url, "pipe_file", data)


@contextmanager
def _place_missing(url: str) -> Generator[None]:
    """A missing folder or bucket becomes a sentence."""
    try:
        yield
    except FileNotFoundError as error:
        local = is_local(file_system(url)[0])
        cause = f"its folder cannot be made ({error})" if local else "there is no such bucket; create it first"
        raise UserError(f"{url} cannot be written: {cause}") from error


def create_once(url: str, data: bytes) -> bytes:
    """Writes a whole file as ``put``, unless there is one. Returns what is there then: of several processes one writes
    it, and all of them find the same.

    Only where nothing can be created at most once, on a file system without hard links or an object store other than
    S3, can two that do so at the same time both write. Raises as ``put``.
    """
    for _ in range(_TRIES):
        try:
            _create(url, data)
            return data
        except FileExistsError:  # perhaps this very file, and the reply was lost
            with suppress(FileNotFoundError):  # removed meanwhile
                return read(url)
    raise UserError(f"{url} cannot be written: something that is no file has its name; remove it")


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
    def act() -> None:
        with atomic_write(path, durable=True) as file:
            file.write(data)

    _in_its_folder(path, act)


def _create(url: str, data: bytes) -> None:
    """Raises FileExistsError if there is a file, and as ``put``."""
    fs, path = file_system(url)
    folder, _, name = url.rpartition("/")
    if is_local(fs):
        with _place_missing(url):
            created = with_local(url, lambda: _create_locally(Path(path), data), writing=True)
        if created is not None:
            if not created:
                raise FileExistsError(url)
            return
    elif folder.startswith("s3://") and "/" in folder.removeprefix("s3://"):
        return open_store(folder).create(name, data)
    if exists(url):
        raise FileExistsError(url)
    put(url, data)


def _create_locally(path: Path, data: bytes) -> bool | None:
    """Whether there was no such file; None if the file system cannot tell."""
    try:
        _in_its_folder(path, lambda: atomic_create(path, data))
    except FileExistsError:
        return False
    except NoHardLinks:
        return None
    return True


def _in_its_folder(path: str | Path, act: Callable[[], None]) -> None:
    for tries_left in range(_TRIES - 1, -1, -1):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return act()
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
