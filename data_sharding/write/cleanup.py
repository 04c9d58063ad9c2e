"""Which files in a dataset's folder are its own, and the removal of those that only its writing needed, or that killed
writers left. Nothing else is touched: the folder may hold what people put there."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from data_sharding.errors import UserError
from data_sharding.storage.atomic_write import destination
from data_sharding.storage.files import fs_call
from data_sharding.storage.filesystems import file_system, is_local

_SHARD = r"shard-\d{6,}\.tar\.zst"
_UNPACKED = re.compile(r"\w+\.tar(\.beat|\.\d+\.tmp)?")
_OWN = {  # by folder in the dataset
    "": re.compile(rf"{_SHARD}|(manifest|skipped|source)\.json"),
    "/manifest": re.compile(r"\w+\.npy"),
    "/parts": re.compile(rf"({_SHARD}|options|software)\.json"),
}
_DIGEST = re.compile(r"[0-9a-f]{32}")  # names a folder in parts/, which holds unpacked archives

log = logging.getLogger(__name__)


def clean(url: str) -> None:
    """Removes the records, the unpacked archives, and the unfinished files of killed writers."""
    file_system(url)[0].invalidate_cache()
    _remove_unfinished_in(url)
    parts = f"{url}/parts"
    for name in _names(parts):
        if _OWN["/parts"].fullmatch(name):
            remove(f"{parts}/{name}", "rm_file")
        elif _DIGEST.fullmatch(name):
            for unpacked in filter(_UNPACKED.fullmatch, _names(f"{parts}/{name}")):
                remove(f"{parts}/{name}/{unpacked}", "rm_file")
            _remove_empty(f"{parts}/{name}")
    _remove_empty(parts)


def remove_unfinished(url: str) -> None:
    """Removes the files that a killed writer had not finished. One that still writes such a file writes it again."""
    for dataset in (url, f"{url}/holdout"):
        _remove_unfinished_in(dataset)


def holds_shards(url: str) -> bool:
    """Whether there is a shard, or the record of one, in the dataset at ``url`` or its holdout."""
    file_system(url)[0].invalidate_cache()
    shard = re.compile(rf"{_SHARD}(\.json)?")
    places = (f"{dataset}{folder}" for dataset in (url, f"{url}/holdout") for folder in ("", "/parts"))
    return any(shard.fullmatch(name) for place in places for name in _names(place))


def remove(url: str, method: str, **options) -> None:
    """What cannot be removed stays: NFS keeps a file that somebody has open, and nobody needs it to be gone."""
    try:
        fs_call(url, method, **options)
    except FileNotFoundError:  # removed by another task, or by an attempt whose reply was lost
        pass
    except UserError as error:
        log.warning("%s was not removed: %s", url, error)


def _remove_unfinished_in(url: str) -> None:
    if is_local(file_system(url)[0]):  # an object store knows no unfinished files
        for path in _unfinished(url):
            remove(path, "rm_file")


def _unfinished(url: str) -> Iterator[str]:
    folders = [(f"{url}{folder}", own) for folder, own in _OWN.items()]
    folders += [(f"{url}/parts/{name}", _UNPACKED) for name in filter(_DIGEST.fullmatch, _names(f"{url}/parts"))]
    for folder, own in folders:
        for name in _names(folder):
            if (whole := destination(Path(name))) and own.fullmatch(whole.name):
                yield f"{folder}/{name}"


def _names(url: str) -> list[str]:
    """What lies in the folder itself; nothing if there is no folder."""
    try:
        return [path.rstrip("/").rpartition("/")[2] for path in fs_call(url, "ls", detail=False)]
    except FileNotFoundError:
        return []


def _remove_empty(url: str) -> None:
    """Removes the local folder, unless something is in it: an object store has no folders."""
    fs, path = file_system(url)
    if is_local(fs):
        with suppress(OSError):
            os.rmdir(path)
