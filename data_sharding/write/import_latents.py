"""``fitv2 shard import``: the published latents of FiT (``published_latents.py``) to shards.

A file is one view of an image (facts of the format: whlzy/FiT, in1k_latent_dataset.py):

    feature    float32 (2, h, w, 16), [flip, row, column, (c p1 p2)], already times 0.18215
    grid       (2, h*w), the column and then the row of each token
    size       (h, w) in tokens
    label      0 .. 999

They are stored unchanged, but in float16. Archives are unpacked into DST/parts first, because the views of an image are
in two of them, in an unknown order; that takes the space of their content until the dataset is complete.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import load

from data_sharding.errors import UserError
from data_sharding.format.class_names import class_digest
from data_sharding.format.codec import PUBLISHED, SD_VAE, CodecRecord
from data_sharding.format.shard import Sample
from data_sharding.format.stored_array import DTYPE
from data_sharding.storage.byte_ranges import read_all
from data_sharding.worker_pool import cores
from data_sharding.write.archives import Archive, unpack
from data_sharding.write.begun import Options, is_finished
from data_sharding.write.build import Inputs, build, report
from data_sharding.write.findings import Findings, Skipped
from data_sharding.write.images import refuse_destination
from data_sharding.write.published_latents import LatentFiles, PublishedLatents, list_latent_files, open_published
from data_sharding.write.shard_task import Made
from data_sharding.write.write_report import WriteReport

_CHANNELS = 16  # of a token
# Each flip is one draw of the posterior.
CODEC: CodecRecord = {
    "name": SD_VAE,
    "digest": PUBLISHED,
    "scale": 0.18215,
    "latent": "sample",
}


_NOT_IN_NUMPY = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3", "F8_E5M2": "float8_e5m2"}


class _Unreadable(Exception):
    """The message holds no path."""


@dataclass(frozen=True)
class ReadLatents:
    """The ``Maker`` of this command."""

    max_tokens: int
    classes: int

    def __call__(self, entries: tuple[LatentFiles, ...]) -> Iterator[Made | Skipped]:
        data = iter(read_all(data for entry in entries for _, data in entry.views))
        for entry in entries:
            files = {view: next(data) for view, _ in entry.views}
            try:
                views = {view: self._parse(file) for view, file in files.items()}
                if "resize" not in views:
                    raise _Unreadable("it has a crop view, but no resize view")
                if len({label for label, _ in views.values()}) > 1:
                    raise _Unreadable("its two views have different labels")
            except _Unreadable as error:
                yield Skipped(entry.key, str(error))
            else:
                sample = Sample(entry.id, views["resize"][0], {view: feature for view, (_, feature) in views.items()})
                yield Made(sample, entry.key, None)

    def _parse(self, file: bytes) -> tuple[int, np.ndarray]:
        """Label and float16 feature of one file. Raises _Unreadable if it is not as described above."""
        try:
            tensors = load(file)
            feature, grid, size, label = (tensors[name] for name in ("feature", "grid", "size", "label"))
        except KeyError as error:
            of_type = [name for name, tensor in deserialize(file) if tensor["dtype"] == error.args[0]]
            if of_type:
                kind = _NOT_IN_NUMPY.get(error.args[0], error.args[0])
                raise _Unreadable(f"{of_type[0]} is {kind}, which is not supported: store it as float32") from error
            raise _Unreadable(f"it has no tensor {error}") from error
        except (SafetensorError, ValueError, TypeError) as error:
            raise _Unreadable(f"not a complete .safetensors file: {error}") from error
        shape = feature.shape
        if feature.dtype.kind != "f" or len(shape) != 4 or shape[0] != 2 or shape[3] != _CHANNELS or 0 in shape:
            raise _Unreadable(f"feature is {feature.dtype}{list(shape)}, not float32[2, h, w, {_CHANNELS}]")
        h, w = shape[1:3]
        if size.ravel().tolist() != [h, w]:
            raise _Unreadable(f"size {size.ravel().tolist()} is not that of the feature, [{h}, {w}]")
        if h * w > self.max_tokens:
            raise _Unreadable(f"{h}x{w} are more than {self.max_tokens} tokens")
        row, column = np.mgrid[:h, :w].reshape(2, -1)
        if grid.shape != (2, h * w) or not np.array_equal(grid, [column, row]):
            raise _Unreadable(f"grid does not number the columns and rows of {h}x{w} tokens")
        if label.size != 1 or label.dtype.kind not in "iu" or not 0 <= label.item() < self.classes:
            raise _Unreadable(f"label {label.ravel().tolist()} is not one of 0 .. {self.classes - 1}")
        if not np.abs(feature).max() <= np.finfo(DTYPE).max:
            raise _Unreadable("feature is not finite in float16")
        return label.item(), feature.astype(DTYPE)


def import_dataset(
    src: str,
    dst: str,
    max_tokens: int | None = None,
    holdout: float = 0.0,
    workers: int | None = None,
    images_per_shard: int = 1000,
    classes: int = 1000,
    progress: bool = True,
) -> WriteReport:
    """Writes the published latents in ``src`` as a dataset at ``dst``. Continues an unfinished dataset, and does not
    change a finished one.

    ``max_tokens`` selects one of several sets in ``src``. An image's id depends on its file's name. Classes are named
    by their numbers, "0" and up. Files of another format are listed in ``dst/skipped.json``.

    Raises:
        UserError: ``src`` has another layout, lacks a part or is damaged; ``dst`` was started with other options; or
            not one file could be read.
    """
    started = time.monotonic()
    src, dst = src.rstrip("/"), dst.rstrip("/")
    refuse_destination(src, dst)
    published = open_published(src, max_tokens)
    names = tuple(map(str, range(classes)))
    sharding = published.max_tokens, images_per_shard, holdout
    options = Options(published.digest, CODEC["digest"], *sharding, class_digest(names))
    made = 0
    if not is_finished(dst, options):
        workers = cores() if workers is None else workers
        findings = Findings()
        entries = _entries(published, dst, workers, progress, findings)
        inputs = Inputs(tuple(entries), names, findings)
        make = ReadLatents(published.max_tokens, classes)
        made = build(src, dst, options, inputs, CODEC, make, workers, progress)
    return report(dst, made, started)


def _entries(
    published: PublishedLatents, dst: str, workers: int, progress: bool, findings: Findings
) -> list[LatentFiles]:
    """Unpacks the archives, and lists all images."""
    if workers < 1:
        raise UserError(f"workers must be at least 1, not {workers}")
    groups, archives = [], []
    for group in published.groups:
        tar = group.files[0][0] if group.is_tar else None
        if not group.folder and not group.is_tar:
            tar = f"{dst}/parts/{published.digest}/{group.name}.tar"
            archives.append(Archive(group.name, group.files, tar))
        groups.append((group, tar))
    unpack(archives, workers, progress)
    findings.add(published.findings)
    return list_latent_files(groups, findings)
