"""Trying again: what may heal is tried until one deadline, with growing pauses of random length; what cannot, once.

    missing (404)                         cannot heal: raised at once
    refused (401, 403, no credentials)    may heal: credentials are renewed while a run goes on; each try logs in anew
    busy, cut, reset, stalled, no answer  may heal
    a wrong or short body (``CorruptRead``)    may heal, unless the same wrong bytes come three times running

A local disk answers the same twice: there only EIO and its like are tried again.
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
_SAME_FAULT = 3
_DISK_MAY_HEAL = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY}
# Libraries below fsspec, whose errors are not all OSErrors.
_NETWORK = {"botocore", "aiobotocore", "aiohttp", "fsspec", "gcsfs", "google", "azure", "requests", "urllib3"}
_NO_LOGIN = {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "CredentialRetrievalError"}

log = logging.getLogger(__name__)


class CorruptRead(Exception):
    """What was read is not what was stored. ``fingerprint`` tells one wrong body from another."""

    def __init__(self, cause: str, fingerprint: str):
        super().__init__(cause)
        self.fingerprint = fingerprint


class RetriesExhausted(Exception):
    """The deadline has passed. The message says what the last attempt met."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long to try. Setting ``cancelled`` ends all waiting at once, with Cancelled."""

    deadline: float = 300.0  # seconds, all attempts and pauses together
    attempt: float = 20.0  # seconds, one attempt
    refused: bool = True  # whether a refusal is waited out; else PermissionError at once
    cancelled: threading.Event = field(default_factory=threading.Event)


def call_with_retry(
    policy: RetryPolicy, url: str, method: Method, *args: Any, check: Callable[[Any], Result], **kw: Any
) -> Result:
    """``check(result)`` of the file system's ``method(path, *args)``, tried until ``check`` accepts it.

    Raises:
        FileNotFoundError, PermissionError (see ``RetryPolicy.refused``), CorruptRead, RetriesExhausted: see above.
        Cancelled: nobody wants it any more.
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
            if not _may_heal(error, is_local(fs)):
                raise
            # An attempt that the deadline cut short says less than the one before it.
            if not (cause and isinstance(error, TimeoutError) and seconds < policy.attempt):
                cause = _sentence(error)
            faults.clear()
            if _is_refusal(error):
                if not policy.refused:
                    raise PermissionError(cause) from error
                refused_by = fs
        wanted = random.uniform(pause / 2, pause)
        if time.monotonic() + wanted >= give_up:
            raise RetriesExhausted(f"{cause}, tried again for {policy.deadline:.0f} s")
        log.info("%s: %s; trying again", url, cause)
        if policy.cancelled.wait(wanted):
            raise Cancelled
        pause = min(2 * pause, _LONGEST_PAUSE)


def _attempt(*args: Any, **kw: Any) -> Any:
    try:
        return attempt(*args, **kw)
    except OSError as error:
        if _status(error) == 416:
            raise CorruptRead("what is stored ends before it", "416") from error
        if _status(error) == 412:  # a conditional create; the file systems differ in what they make of it
            raise FileExistsError(str(error)) from error
        raise


def _may_heal(error: Exception, local: bool) -> bool:
    """Whether this is a passing trouble of the storage, not a mistake in the program or a final answer."""
    if isinstance(error, Cancelled | FileNotFoundError | NotADirectoryError | IsADirectoryError | FileExistsError):
        return False
    if local:
        return isinstance(error, OSError) and error.errno in _DISK_MAY_HEAL
    kinds = (kind.__module__.partition(".")[0] for kind in type(error).__mro__)
    return isinstance(error, OSError) or any(kind in _NETWORK for kind in kinds)


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, PermissionError) or _status(error) in (401, 403) or type(error).__name__ in _NO_LOGIN


def _status(error: Exception) -> int | None:
    """The HTTP status behind an error of s3fs."""
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def _sentence(error: Exception) -> str:
    """The error in one line: the server's own code where there is one, else its kind where the text says little."""
    if status := _status(error):
        code = error.__cause__.response.get("Error", {}).get("Code", "")
        return f"{status} {code}".removesuffix(f" {status}").strip()  # a HEAD has no body to name the code
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")
