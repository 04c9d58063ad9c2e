"""Retries: transient errors are retried until one deadline, with exponential backoff and jitter; others are raised.

    missing (404) or another answer about the name  permanent: raised at once
    no room on a disk                               permanent: the caller may come again
    refused (401, 403, no credentials, EACCES)      transient, unless the policy says otherwise: credentials are renewed
                                                    during a run; each retry logs in again
    busy, cut, reset, stalled, no answer            transient, as is every other errno (see ``failures``)
    a wrong or short body (``CorruptRead``)         transient, unless the same wrong bytes come three times in a row

A local disk gives the same wrong bytes twice: there they are permanent at once.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from data_sharding.errors import UserError
from data_sharding.storage.failures import is_refused, may_pass
from data_sharding.storage.filesystems import Cancelled, Method, attempt, file_system, is_local, refuse_pipe

Result = TypeVar("Result")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds
_SILENCE = 5.0  # seconds without an answer after which this is logged
_SAME_FAULT = 3  # times that the same wrong bytes must come before they are taken for what is stored
# Libraries that fsspec uses; not all of their errors are OSErrors.
_NETWORK = {"botocore", "aiobotocore", "aiohttp", "fsspec", "gcsfs", "google", "azure", "requests", "urllib3"}
_NO_LOGIN = {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "CredentialRetrievalError"}
# Of botocore: what it was told is wrong, and nothing was sent.
_MISCONFIGURED = {"ParamValidationError", "ProfileNotFound", "ConfigParseError", "ConfigNotFound", "InvalidConfigError"}
_MISCONFIGURED |= {"InvalidRegionError", "InvalidEndpointConfigurationError", "EndpointProviderError"}

log = logging.getLogger(__name__)


class CorruptRead(Exception):
    """The bytes that were read are not those that were written. ``fingerprint`` identifies the wrong bytes."""

    def __init__(self, cause: str, fingerprint: str):
        super().__init__(cause)
        self.fingerprint = fingerprint


class RetriesExhausted(Exception):
    """The deadline has passed. The message names the last attempt's error, which is the ``__cause__``."""


class _Silence:
    """Logs once per outage that the storage does not answer, however many threads wait for it."""

    def __init__(self) -> None:
        self._lock, self._said_until = threading.Lock(), 0.0

    def look(self, url: str, began: float, deadline: float, cause: str) -> None:
        """``began``: when the call that still has no answer did, by the monotonic clock."""
        now = time.monotonic()
        if now - began < _SILENCE:
            return
        with self._lock:
            said, self._said_until = now < self._said_until, max(self._said_until, began + deadline)
        if not said:
            log.warning("no answer from %s%s; retrying until %.0f s", url, f" ({cause})" if cause else "", deadline)


@dataclass(frozen=True)
class RetryPolicy:
    """For how long to retry. Setting ``cancelled`` ends all waiting at once, with Cancelled."""

    deadline: float = 300.0  # seconds for all attempts and pauses together
    attempt: float = 20.0  # seconds for one attempt
    retry_refused: bool = True  # whether a refusal is retried; else it is a PermissionError at once
    cancelled: threading.Event = field(default_factory=threading.Event)
    silence: _Silence = field(default_factory=_Silence, repr=False)


def call_with_retry(
    policy: RetryPolicy, url: str, method: Method, *args: Any, check: Callable[[Any], Result], **kw: Any
) -> Result:
    """``check(result)`` of the file system's ``method(path, *args)``, retried until ``check`` accepts the result.

    Raises:
        FileNotFoundError, PermissionError (see ``RetryPolicy.retry_refused``), CorruptRead, RetriesExhausted: see the
            top of this module.
        UserError: the storage cannot be asked as it is configured; the path leads to a pipe.
        Cancelled: ``policy.cancelled`` was set.
    """
    fs, path = file_system(url)

    def login_again() -> None:
        nonlocal fs, path
        fs, path = file_system(url, instead_of=fs)

    def act(seconds: float, waiting: Callable[[], None]) -> Result:
        found = _attempt(fs, method, path, *args, seconds=seconds, cancelled=policy.cancelled, waiting=waiting, **kw)
        return check(found)

    if not is_local(fs):
        return _retrying(policy, url, act, _may_pass_remotely, login_again)
    refuse_pipe(path)
    return _retrying(policy, url, act, lambda error: _may_pass_locally(error, writing=False), login_again)


def retry_local(policy: RetryPolicy, url: str, act: Callable[[], Result], writing: bool) -> Result:
    """``act()`` on the local path ``url``, retried while the file system has trouble. Raises as ``call_with_retry``,
    and the OSErrors that are answers; ``writing``: see ``failures``."""
    if not writing:
        refuse_pipe(url)
    passes = lambda error: _may_pass_locally(error, writing)  # noqa: E731
    return _retrying(policy, url, lambda seconds, waiting: act(), passes, lambda: None)


def _retrying(
    policy: RetryPolicy,
    url: str,
    act: Callable[[float, Callable[[], None]], Result],
    may_pass: Callable[[Exception], bool],
    login_again: Callable[[], None],
) -> Result:
    """``act(seconds for this attempt, to be called while it waits)``, retried after errors that may pass."""
    began, pause, faults, cause, last = time.monotonic(), _FIRST_PAUSE, [], "", Exception()

    def waiting() -> None:
        policy.silence.look(url, began, policy.deadline, cause)

    while True:
        seconds = max(_FIRST_PAUSE, min(policy.attempt, began + policy.deadline - time.monotonic()))
        refused = False
        try:
            return act(seconds, waiting)
        except CorruptRead as error:
            faults.append(error.fingerprint)
            if not may_pass(error) or faults[-_SAME_FAULT:] == _SAME_FAULT * [error.fingerprint]:
                raise
            cause, last = str(error), error
        except Exception as error:
            if not may_pass(error):
                raise
            # The error of an attempt that the deadline cut short tells less than that of the one before.
            if not (cause and isinstance(error, TimeoutError) and seconds < policy.attempt):
                cause, last = _sentence(error), error
            faults.clear()
            if (refused := _is_refusal(error)) and not policy.retry_refused:
                raise PermissionError(cause) from error
        waiting()
        wait = random.uniform(pause / 2, pause)
        if time.monotonic() + wait >= began + policy.deadline:
            raise RetriesExhausted(f"{cause}, retried for {policy.deadline:.0f} s") from last
        log.info("%s: %s; retrying", url, cause)
        if policy.cancelled.wait(wait):
            raise Cancelled
        if refused:
            login_again()
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
    except Exception as error:
        if type(error).__name__ in _MISCONFIGURED or str(error).startswith("Invalid endpoint"):
            raise UserError(
                f"the storage cannot be asked ({_sentence(error)}): correct AWS_ENDPOINT_URL, which needs a scheme as "
                "in http://127.0.0.1:9000, the profile, the region or the name of the bucket"
            ) from error
        raise


def _may_pass_locally(error: Exception, writing: bool) -> bool:
    return isinstance(error, OSError) and may_pass(error, writing)  # wrong bytes stay what they are


def _may_pass_remotely(error: Exception) -> bool:
    """Whether this is a passing error of the storage, not a bug of the program or a final answer."""
    if isinstance(error, Cancelled | UserError):
        return False
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | FileExistsError):
        return False
    if isinstance(error, CorruptRead):
        return True
    kinds = (kind.__module__.partition(".")[0] for kind in type(error).__mro__)
    return isinstance(error, OSError) or any(kind in _NETWORK for kind in kinds)


def _is_refusal(error: Exception) -> bool:
    refused = isinstance(error, OSError) and is_refused(error)
    return refused or _status(error) in (401, 403) or type(error).__name__ in _NO_LOGIN


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
