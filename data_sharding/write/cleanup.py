"""Removes what only the writing of a dataset needed, and what killed writers left."""

import logging
from pathlib import Path

from data_sharding.errors import UserError
from data_sharding.storage.atomic_write import destination
from data_sharding.storage.files import exists, fs_call
from data_sharding.storage.filesystems import file_system, is_local

log = logging.getLogger(__name__)


def clean(url: str) -> None:
    """Removes the records, and the unfinished files of killed writers."""
    fs, root = file_system(url)
    fs.invalidate_cache()
    if is_local(fs) and exists(f"{url}/parts"):
        remove(f"{url}/parts", "rm", recursive=True)
    for path in fs_call(url, "find"):  # one by one: "rm" of an object store takes [ and * in the URL for a pattern
        if path.endswith(".tmp") or path.startswith(f"{root}/parts/"):
            remove(fs.unstrip_protocol(path), "rm_file")


def remove_unfinished(url: str) -> None:
    """Removes the files that a killed writer had not finished. One that still writes such a file writes it again."""
    fs, _ = file_system(url)
    for path in fs_call(url, "find") if is_local(fs) else ():
        if destination(Path(path)) is not None:
            remove(fs.unstrip_protocol(path), "rm_file")


def remove(url: str, method: str, **options) -> None:
    """What cannot be removed stays: NFS keeps a file that somebody has open, and nobody needs it to be gone."""
    try:
        fs_call(url, method, **options)
    except FileNotFoundError:  # removed by another task, or by an attempt whose reply was lost
        pass
    except UserError as error:
        log.warning("%s was not removed: %s", url, error)
