"""Local files that no reader ever sees in part: written under a temporary name beside their own, then renamed."""

import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path, *, durable: bool, temporary: Path | None = None) -> Generator[BufferedWriter]:
    """A new file that takes the place of ``path`` when the context is left without an error, and is removed otherwise.

    ``durable``: a power cut after that loses neither the bytes nor the name. ``temporary``: see ``temporary_file``. The
    folder must exist. Raises OSError.
    """
    with temporary_file(Path(path), temporary) as (file, written):
        yield file
        file.flush()
        if durable:
            os.fsync(file.fileno())
        os.replace(written, path)
        if durable:
            fsync_folder(Path(path).parent)


@contextmanager
def temporary_file(path: Path, temporary: Path | None = None) -> Generator[tuple[BufferedWriter, Path]]:
    """A file beside ``path``, open for writing, and its own path; it is removed when the context is left.

    Its name is ``.<name of path>.<16 hex digits>.tmp``, drawn at random, for two writers must not share it; or
    ``temporary``, where the caller knows that nobody else writes, and then finds again what a killed writer left.
    """
    written = temporary or path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(written, "wb" if temporary else "xb") as file:
            yield file, written
    finally:
        written.unlink(missing_ok=True)


def destination(temporary: Path) -> Path:
    """The path for which ``temporary_file`` drew this name."""
    return temporary.with_name(temporary.name[1:-21])


def fsync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` durable: fsync of a new file alone does not."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
