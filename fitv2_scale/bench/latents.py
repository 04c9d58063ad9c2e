"""The latents on which loaders are compared: ImageNet's sizes (a preset), values as incompressible as real ones."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_sharding.errors import UserError
from data_sharding.format.shard import VIEWS, Sample
from data_sharding.format.stored_array import DTYPE
from data_sharding.plan.size_presets import open_preset
from data_sharding.storage.filesystems import file_system
from fitv2_scale.bench.loaders import import_loader

PRESET = "preset:imagenet256"
MAX_TOKENS = 256
CLASSES = 1000
_DONE = "written.json"
_CHANNELS = 16  # of a token
_UPLOADS = 16  # in parallel


def make_samples(images: int) -> Iterator[Sample]:
    """Samples with both flips of each view, standard normal, in float16; the same at every call."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.unique(rng.integers(1 << 62, size=2 * images)))[:images]
    for i, size in enumerate(open_preset(PRESET, images).size.tolist()):
        views = {
            view: rng.standard_normal((2, h, w, _CHANNELS), np.float32).astype(DTYPE)
            for view, (h, w) in zip(VIEWS, size, strict=True)
            if h
        }
        yield Sample(int(ids[i]), i % CLASSES, views)


def write_latents(folder: Path, images: int, loaders: list[str]) -> None:
    """Writes the latents in the format of each loader to folder/<loader>; those that exist already are kept.

    Raises:
        UserError: the folder holds another number of images.
    """
    for loader in loaders:
        target = folder / loader
        done, wanted = target / _DONE, json.dumps({"images": images})
        if done.is_file():
            if done.read_text() != wanted:
                raise UserError(f"{target} holds {done.read_text()}, not {wanted}: choose another --folder")
            continue
        if target.exists() and any(target.iterdir()):
            raise UserError(f"{target} holds other files, or was not written completely: remove it")
        target.mkdir(parents=True, exist_ok=True)
        import_loader(loader).write(make_samples(images), target)
        done.write_text(wanted)


def upload(folder: Path, url: str) -> None:
    """Uploads all files below ``folder`` to ``url``, an s3:// prefix."""
    fs, path = file_system(url)
    fs.put(f"{folder}/", f"{path}/", recursive=True, batch_size=_UPLOADS)


def drop_from_page_cache(folder: Path) -> None:
    """Removes the files below ``folder`` from the page cache; the disk's own cache, names and inodes stay cached."""
    os.sync()  # pages that are not on disk yet cannot be dropped
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
