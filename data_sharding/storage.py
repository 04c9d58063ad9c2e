"""Whole files, local or on an object store: written so that no reader sees a part, read in one go."""

import os
import uuid

import fsspec
from fsspec.implementations.local import LocalFileSystem


def put(url: str, data: bytes) -> None:
    """Writes a whole file that no reader ever sees in part: a rename locally, one put on an object store."""
    fs, path = fsspec.core.url_to_fs(url)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    fs.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"  # two writers of one file must not share it
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read(url: str) -> bytes:
    """A whole file. Raises FileNotFoundError."""
    fs, path = fsspec.core.url_to_fs(url)
    return fs.cat_file(path)
