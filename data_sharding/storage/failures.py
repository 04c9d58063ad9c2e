"""What an errno of a local or mounted file system means, and the sentence that its user reads.

    the name leads to no file (_NAME)          an answer: it will be the same tomorrow
    not allowed (_REFUSED)                     an answer at first; what was allowed before is trouble that may pass
    no room, or there already, when writing    an answer: the caller may come again
    every other errno, known or not            trouble of the storage: wait for it

A list of what may pass could not be kept: an evicted client of a Lustre file system alone meets ENOTCONN, ENODEV, EIO
and ESHUTDOWN, which Python raises as BrokenPipeError. What is final is a short list, and known.
"""

import errno
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from data_sharding.errors import StorageDown, UserError

_NAME = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def may_pass(error: OSError, writing: bool) -> bool:
    """Whether waiting may help."""
    if error.errno in _NAME or isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return False
    return not writing or not (error.errno in _FULL or isinstance(error, FileExistsError))


def is_refused(error: OSError) -> bool:
    """Whether access was refused, or the file system can only be read."""
    return error.errno in _REFUSED or isinstance(error, PermissionError)


def failure(url: str, error: OSError) -> UserError:
    """``error``, of the file or folder at the local path ``url``, as one sentence: StorageDown unless the user has to
    change something first."""
    cause = error.strerror or str(error) or type(error).__name__
    if error.errno in _FULL:
        return StorageDown(
            f"{url} cannot be written: {cause}; free some space there (or raise the quota), then start again"
        )
    if is_refused(error):
        return UserError(f"{url} cannot be used: {cause}; check who owns it, its permissions and how it is mounted")
    if error.errno in _NAME or isinstance(error, FileExistsError):
        return UserError(f"{url} cannot be used: {cause}; give another path, or remove what is in its way")
    return StorageDown(f"{url} cannot be reached: {cause}; check the storage, then start again")


@contextmanager
def as_sentence(url: str | Path) -> Generator[None]:
    """An OSError inside, of the file or folder at the local path ``url``, becomes the sentence of ``failure``."""
    try:
        yield
    except OSError as error:
        raise failure(str(url), error) from error


def unreachable(url: str, error: Exception, local: bool) -> StorageDown:
    """After the last retry, whose error names the cause."""
    check = "the storage" if local else "AWS_ENDPOINT_URL and the storage"
    return StorageDown(f"{url} cannot be reached: {error}; check {check}, then start again")


def refused(url: str, error: Exception) -> UserError:
    """An object store refuses access."""
    return UserError(f"access to {url} is refused ({error}): check the credentials and their permissions")
