"""Tells a bad place of a disk from an outage of the storage. Both answer a read with an input/output error (EIO), but
where one place is bad, others can be read: other parts of the file, or other files beside it."""

import errno
import os
from collections.abc import Sequence

from data_sharding.storage.retry import RetriesExhausted, RetryPolicy, retry_local

_SECONDS = 10.0  # in which another place must answer
# Of a disk that cannot read a sector, and of file systems and devices that check what they read.
_ERRORS = {errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.EILSEQ, errno.ENODATA}


def may_be_bad_place(error: BaseException | None) -> bool:
    """Whether ``error``, of a read of a local or mounted file system, is one that a bad place gives."""
    return isinstance(error, OSError) and error.errno in _ERRORS


def can_be_read(path: str, places: Sequence[int]) -> bool:
    """Whether the bytes of the local file at these offsets can be read from where they are stored: what memory still
    holds of them proves nothing. A negative offset counts from the end."""

    def act() -> bool:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for place in places:
                file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
                if not file.read(1):
                    return False
        return True

    try:
        return retry_local(RetryPolicy(_SECONDS, retry_refused=False), path, act, writing=False)
    except (OSError, RetriesExhausted):
        return False
