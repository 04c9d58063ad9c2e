"""The manifest's columns: .npy files, little-endian, no pickle, each with its digest in the header.

A column is memory-mapped, never read as a whole, so a process holds only the parts that it uses, and all processes of a
node share them. With a cache folder it is first copied to the node's disk, under the name of its digest:

    CACHE/columns/3f09…c2.npy    created by rename; any number of ranks and runs may use it

Whoever reads a mapped page that its storage cannot deliver, because the file was cut or a network file system is down,
dies of SIGBUS: the copies keep the storage of the dataset from being needed again.
"""

import io
import logging
import os
from collections.abc import Iterator

import numpy as np
import xxhash

from data_sharding.errors import DataError, UserError
from data_sharding.storage.atomic_write import atomic_write
from data_sharding.storage.byte_ranges import read_range
from data_sharding.storage.file_digest import file_digest
from data_sharding.storage.files import with_local
from data_sharding.storage.filesystems import file_system, is_local

# column: (dtype, number of rows, shape of a row). F frames, F+1 their boundaries, N samples.
COLUMNS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "frame_shard": ("<i4", "F", ()),  # index into the header's shards
    "frame_offset": ("<i8", "F", ()),  # bytes from the start of the shard's file
    "frame_bytes": ("<i8", "F", ()),  # compressed
    "frame_raw_bytes": ("<i8", "F", ()),  # decompressed
    "frame_digest": ("<u8", "F", (2,)),  # xxh3_128 of the compressed frame: low word, high word
    "frame_first": ("<i8", "F+1", ()),  # the frame's samples are rows frame_first[f] .. frame_first[f+1]-1
    "sample_id": ("<i8", "N", ()),
    "label": ("<i4", "N", ()),
    "size": ("<u2", "N", (2, 2)),  # [resize|crop][h, w] in tokens; zeros if the image has no crop view
}
_ROWS = 1 << 18  # in one block
_SPAN = 1 << 24  # bytes copied at once
_REMEDY = "restore it from a copy or write the dataset again"

log = logging.getLogger(__name__)


def read_column(url: str, name: str, file: dict[str, int | str], totals: dict[str, int], cache_dir: str) -> np.ndarray:
    """The column ``name`` of the dataset at ``url``; ``file`` and ``totals`` are from its header.

    It is memory-mapped: its copy in ``cache_dir``, or else itself if it is a file. Without ``cache_dir``, one on an
    object store is read into memory.

    Raises:
        DataError: it is missing, damaged, or not of the header's shape.
    """
    where = f"{url}/manifest/{name}.npy"
    try:
        column = _open(where, file, cache_dir)
    except FileNotFoundError as error:
        raise DataError(f"{where} is missing: {_REMEDY}") from error
    except (OSError, UserError):
        raise
    except Exception as error:  # numpy parses a header as Python, and passes on whatever that raises
        raise DataError(f"{where} is not a complete .npy file: {_REMEDY}") from error
    dtype, rows, row_shape = COLUMNS[name]
    shape = ({"F": totals["frames"], "F+1": totals["frames"] + 1, "N": totals["samples"]}[rows], *row_shape)
    if column.shape != shape or column.dtype != np.dtype(dtype):
        raise DataError(f"{where} is {column.dtype}{list(column.shape)}, not {np.dtype(dtype)}{list(shape)}: {_REMEDY}")
    return column


def blocks(column: np.ndarray) -> Iterator[np.ndarray]:
    """A whole column, some rows at a time. A mapped one is read from its file: what is read through the mapping counts
    as this process's memory."""
    if not isinstance(column, np.memmap) or column.filename is None:
        yield from (column[at : at + _ROWS] for at in range(0, len(column), _ROWS))
        return
    row = column.itemsize * int(np.prod(column.shape[1:]))
    for at in range(0, len(column), _ROWS):
        begin, end = (column.offset + row * n for n in (at, min(at + _ROWS, len(column))))
        block = read_range(os.fspath(column.filename), begin, end)
        yield np.frombuffer(block, column.dtype).reshape(-1, *column.shape[1:])


def _open(where: str, file: dict[str, int | str], cache_dir: str) -> np.ndarray:
    fs, path = file_system(where)
    if cache_dir:
        try:
            return np.load(_local_copy(where, file, cache_dir), mmap_mode="r", allow_pickle=False)
        except OSError as error:
            instead = "mapped where it lies" if is_local(fs) else "read into memory"
            log.warning("%s cannot be used for the manifest (%s): %s is %s", cache_dir, error, where, instead)
    if not is_local(fs):
        return np.load(io.BytesIO(b"".join(_download(where, file))), allow_pickle=False)
    column = with_local(where, lambda: np.load(path, mmap_mode="r", allow_pickle=False))
    # From the file, not the mapping: see ``blocks``.
    if with_local(where, lambda: file_digest(path)) != file["xxh3_128"]:
        raise _damaged(where)
    return column


def _local_copy(where: str, file: dict[str, int | str], cache_dir: str) -> str:
    """The path of the column's copy on this node. Raises OSError if the disk cannot hold it, and as ``_download``."""
    folder = os.path.join(os.path.expanduser(cache_dir), "columns")
    path = os.path.join(folder, f"{file['xxh3_128']}.npy")
    if os.path.exists(path) and file_digest(path) == file["xxh3_128"]:
        return path
    os.makedirs(folder, exist_ok=True)
    with atomic_write(path, durable=False) as copy:  # not durable: its digest is compared whenever it is opened
        for data in _download(where, file):
            copy.write(data)
    return path


def _download(where: str, file: dict[str, int | str]) -> Iterator[bytes]:
    """The file in pieces. Raises DataError if it is missing or, after the last piece, if its digest is wrong."""
    digest, size = xxhash.xxh3_128(), int(file["bytes"])
    for start in range(0, size, _SPAN):
        try:
            data = read_range(where, start, min(start + _SPAN, size))
        except FileNotFoundError as error:
            raise DataError(f"{where} is missing: {_REMEDY}") from error
        digest.update(data)
        yield data
    if digest.hexdigest() != file["xxh3_128"]:
        raise _damaged(where)


def _damaged(where: str) -> DataError:
    return DataError(f"{where} does not match its digest in manifest.json: {_REMEDY}")
