"""Standard output and standard error that may fail: the reader of a pipe goes away (a pager, a killed `tee`), the
terminal closes, the disk of a redirected log is full.

What a report prints on standard output is its result, so a failure there ends it. All else that is printed only
accompanies the work: what cannot be written is dropped, and the work continues.
"""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from data_sharding.errors import UserError


class ReaderGone(Exception):
    """Nobody reads standard output any more: a pager has seen enough."""


class _Dropping:
    """A text stream that drops what it cannot write. All but ``write`` and ``flush`` is ``stream``'s."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.failed(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """Called with what a write has raised."""


class _Reporting(_Dropping):
    """Raises ReaderGone for a pipe that nobody reads, and UserError for anything else."""

    def failed(self, error: Exception) -> None:
        if isinstance(error, BrokenPipeError):
            raise ReaderGone from error
        raise UserError(f"standard output cannot be written: {error}") from error


@contextmanager
def reporting() -> Generator[None]:
    """For a program that reports: inside, a failure of standard output raises ReaderGone or UserError; what standard
    error cannot take is dropped."""
    _open_closed_descriptors()
    with _replaced(_Reporting, _Dropping):
        yield


@contextmanager
def dropping() -> Generator[None]:
    """For work that is worth more than what it prints: inside, what neither stream can take is dropped, in all
    threads."""
    with _replaced(_Dropping, _Dropping):
        yield


@contextmanager
def _replaced(out: type[_Dropping], err: type[_Dropping]) -> Generator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out(_innermost(before[0])), err(_innermost(before[1]))  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in map(_innermost, before):
            _empty(stream)


def _innermost(stream: Any) -> Any:
    """The stream itself, of one that may have been replaced already; None is what Python has for a closed one."""
    if stream is None:
        return open(os.devnull, "w")
    return stream.stream if isinstance(stream, _Dropping) else stream


def _empty(stream: TextIO) -> None:
    """Writes what is buffered. If that fails it goes nowhere: Python tries again when it exits, and would change the
    exit code to 120."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            stream.flush()


def _open_closed_descriptors() -> None:
    """Opens those of 0, 1 and 2 that the caller has closed: else the next file would get that number, and what
    libraries print would be written into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
