"""Retries: transient errors are retried until one deadline, with exponential backoff and jitter; others are raised.

    missing (404)                            permanent: raised at once
    refused (401, 403, no credentials)       transient: credentials are renewed during a run; each retry logs in again
    busy, cut, reset, stalled, no answer     transient
    a wrong or short body (``CorruptRead``)  transient, unless the same wrong bytes come three times in a row

A local disk gives the same answer twice: there only EIO and similar errors are retried.
"""

import errno
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from data_sharding.storage.filesystems import Cancelled, Method, attempt, file_system, is_local

Result = TypeVar("Result")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds
_SAME_FAULT = 3  # times that the same wrong bytes must come before they are taken for what is stored
_TRANSIENT_ERRNO = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY}
# Libraries that fsspec uses; not all of their errors are OSErrors.
_NETWORK = {"botocore", "aiobotocore", "aiohttp", "fsspec", "gcsfs", "google", "azure", "requests", "urllib3"}
_NO_LOGIN = {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "CredentialRetrievalError"}

log = logging.getLogger(__name__)


class CorruptRead(Exception):
    """The bytes that were read are not those that were written. ``fingerprint`` identifies the wrong bytes."""

    def __init__(self, cause: str, fingerprint: str):
        super().__init__(cause)
        self.fingerprint = fingerprint


class RetriesExhausted(Exception):
    """The deadline has passed. The message names the last attempt's error."""


@dataclass(frozen=True)
class RetryPolicy:
    """For how long to retry. Setting ``cancelled`` ends all waiting at once, with Cancelled."""

    deadline: float = 300.0  # seconds for all attempts and pauses together
    attempt: float = 20.0  # seconds for one attempt
    retry_refused: bool = True  # whether a refusal is retried; else it is a PermissionError at once
    cancelled: threading.Event = field(default_factory=threading.Event)


def call_with_retry(
    policy: RetryPolicy, url: str, method: Method, *args: Any, check: Callable[[Any], Result], **kw: Any
) -> Result:
    """``check(result)`` of the file system's ``method(path, *args)``, retried until ``check`` accepts the result.

    Raises:
        FileNotFoundError, PermissionError (see ``RetryPolicy.retry_refused``), CorruptRead, RetriesExhausted: see the
            top of this module.
        Cancelled: ``policy.cancelled`` was set.
    """
    give_up, pause, faults = time.monotonic() + policy.deadline, _FIRST_PAUSE, []
    refused_by, cause = None, ""
    while True:
        fs, path = file_system(url, instead_of=refused_by)
        seconds = max(_FIRST_PAUSE, min(policy.attempt, give_up - time.monotonic()))
        refused_by = None
        try:
            return check(_attempt(fs, method, path, *args, seconds=seconds, cancelled=policy.cancelled, **kw))
        except CorruptRead as error:
            faults.append(error.fingerprint)
            if is_local(fs) or faults[-_SAME_FAULT:] == _SAME_FAULT * [error.fingerprint]:
                raise
            cause = str(error)
        except Exception as error:
            if not _is_transient(error, is_local(fs)):
                raise
            # The error of an attempt that the deadline cut short tells less than that of the one before.
            if not (cause and isinstance(error, TimeoutError) and seconds < policy.attempt):
                cause = _sentence(error)
            faults.clear()
            if _is_refusal(error):
                if not policy.retry_refused:
                    raise PermissionError(cause) from error
                refused_by = fs
        wait = random.uniform(pause / 2, pause)
        if time.monotonic() + wait >= give_up:
            raise RetriesExhausted(f"{cause}, retried for {policy.deadline:.0f} s")
        log.info("%s: %s; retrying", url, cause)
        if policy.cancelled.wait(wait):
            raise Cancelled
        pause = min(2 * pause, _LONGEST_PAUSE)


def _attempt(*args: Any, **kw: Any) -> Any:
    try:
        return attempt(*args, **kw)
    except OSError as error:
        if _status(error) == 416:
            raise CorruptRead("the stored object ends before this range", "416") from error
        if _status(error) == 412:  # a conditional create; file systems raise different errors for it
            raise FileExistsError(str(error)) from error
        raise


def _is_transient(error: Exception, local: bool) -> bool:
    """Whether this is a passing error of the storage, not a bug of the program or a final answer."""
    if isinstance(error, Cancelled | FileNotFoundError | NotADirectoryError | IsADirectoryError | FileExistsError):
        return False
    if local:
        return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO
    kinds = (kind.__module__.partition(".")[0] for kind in type(error).__mro__)
    return isinstance(error, OSError) or any(kind in _NETWORK for kind in kinds)


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, PermissionError) or _status(error) in (401, 403) or type(error).__name__ in _NO_LOGIN


def _response(error: Exception) -> dict:
    """The server's reply behind an error of s3fs, as botocore parsed it; empty if there is none."""
    return getattr(error.__cause__, "response", None) or {}


def _status(error: Exception) -> int | None:
    return _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")


def _sentence(error: Exception) -> str:
    """The error in one line: the server's own code if there is one; else the text, with the class unless it is an
    OSError."""
    if status := _status(error):
        code = _response(error).get("Error", {}).get("Code", "")
        return f"{status} {code}".removesuffix(f" {status}").strip()  # a HEAD has no body to name the code
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")
