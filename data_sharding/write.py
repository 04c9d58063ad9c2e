"""Writing a dataset: images to latents to shards, in parallel, resumable, the same bytes every time.

Which image goes into which shard follows from the source and the options alone. Each shard is made in one go by one
process and leaves, last, a record in ``parts/``. A writer that starts again skips the shards that have a record, so one
that was killed goes on where it was. When all records are there, the manifests are written from them and ``parts/`` is
removed.

    DST/parts/options.json                      what this unfinished dataset is made of
    DST/parts/shard-000000.tar.zst.json         {"index": {"name": …, "frames": [[…], …], …}, "skipped": […]}
    DST/skipped.json                            [{"source": "cat/3.jpg", "reason": "OSError: image file is trunc…"}]
    DST/holdout/                                with holdout > 0: a dataset of its own
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import fsspec
import numpy as np
from tqdm import tqdm

from data_sharding.codec import Codec, get_codec
from data_sharding.errors import UserError
from data_sharding.keyed import Purpose, words64
from data_sharding.manifest import FILE, Header, Manifest, write_manifest
from data_sharding.pool import run_tasks
from data_sharding.shard import DTYPE, Sample, ShardBuilder, ShardIndex
from data_sharding.sources import Entry, Source, open_folder
from data_sharding.storage import put, read
from data_sharding.views import UnreadableImage, encode_views, load_rgb, square_side


@dataclass(frozen=True)
class Options:
    """All that decides the bytes of a dataset. ``source`` and ``codec`` are digests, ``holdout`` a share of images."""

    source: str
    codec: str
    max_tokens: int
    images_per_shard: int
    holdout: float

    @classmethod
    def of(cls, header: Header) -> "Options":
        made = header.source
        return cls(made["digest"], header.codec["digest"], header.max_tokens, made["images_per_shard"], made["holdout"])


@dataclass(frozen=True)
class ShardTask:
    """One shard of the dataset at ``dataset``, for one process to write."""

    dataset: str
    name: str
    entries: tuple[Entry, ...]
    classes: tuple[str, ...]
    codec: str
    max_tokens: int

    @property
    def part(self) -> str:
        return f"{self.dataset}/parts/{self.name}.json"


@dataclass(frozen=True)
class WriteReport:
    """``images`` and ``held_out`` are in the two datasets, ``skipped`` in neither; ``encoded`` ones by this call."""

    url: str
    images: int
    held_out: int
    skipped: int
    shards: int
    bytes: int
    encoded: int
    seconds: float


def write_dataset(
    src: str,
    dst: str,
    codec: str = "dct",
    max_tokens: int = 256,
    holdout: float = 0.0,
    workers: int | None = None,
    images_per_shard: int = 1000,
    progress: bool = True,
) -> WriteReport:
    """Writes the class-folder tree ``src`` as a dataset at ``dst``, or goes on with, or finds it, finished.

    ``holdout`` sets aside exactly round(holdout * images), chosen by key. ``workers`` is the number of processes (all
    cores of this job). Images that cannot be read are listed in ``dst/skipped.json``; the rest is written.

    Raises:
        UserError: bad options or source, ``dst`` was begun with others, or no image could be read.
    """
    started = time.monotonic()
    src, dst = src.rstrip("/"), dst.rstrip("/")
    made_by = get_codec(codec)
    source = _open(src, dst)
    options = _checked(Options(source.digest, made_by.digest, max_tokens, images_per_shard, holdout))
    datasets = _divide(source, dst, holdout)
    tasks = [
        ShardTask(url, f"shard-{i:06d}.tar.zst", entries[at : at + images_per_shard], source.classes, codec, max_tokens)
        for url, entries in datasets.items()
        for i, at in enumerate(range(0, len(entries), images_per_shard))
    ]
    encoded = 0
    if not _finished(dst, options):
        todo = [task for task in tasks if not _exists(task.part)]
        encoded, total = sum(len(task.entries) for task in todo), len(source.entries)
        with _progress_bar(total, total - encoded, progress) as bar:
            run_tasks(todo, write_shard, _cores() if workers is None else workers, bar.update)
        _commit(src, datasets, tasks, options, made_by, source.classes)
    _clean(datasets)
    headers = [Manifest.load(url).header for url in datasets]
    totals = {key: sum(h.totals[key] for h in headers) for key in ("samples", "skipped", "bytes")}
    return WriteReport(
        url=dst,
        images=headers[0].totals["samples"],
        held_out=totals["samples"] - headers[0].totals["samples"],
        skipped=totals["skipped"],
        shards=sum(len(h.shards) for h in headers),
        bytes=totals["bytes"],
        encoded=encoded,
        seconds=time.monotonic() - started,
    )


def write_shard(task: ShardTask, on_image: Callable[[], None]) -> None:
    """Writes one shard and then its record; calls ``on_image`` after each image."""
    codec = get_codec(task.codec)
    builder, skipped = ShardBuilder(task.name), []
    for entry in task.entries:
        data = read(entry.url)
        try:
            image = load_rgb(data)
        except UnreadableImage as error:
            skipped.append({"source": entry.key, "reason": str(error)})
        else:
            sample = Sample(entry.id, entry.label, encode_views(image, codec, task.max_tokens))
            class_name, pixels = task.classes[entry.label], (image.height, image.width)
            builder.add(sample, class_name=class_name, source=entry.key, pixels=pixels)
        on_image()
    data, index = builder.finish()
    if index.samples:
        put(f"{task.dataset}/{task.name}", data)
    put(task.part, json.dumps({"index": index.to_record(), "skipped": skipped}).encode())


def _progress_bar(total: int, done: int, show: bool) -> tqdm:
    """Images, images/s and time left: a bar in a terminal, else, as logs want it, a line about every 10 s."""
    if sys.stderr.isatty():
        return tqdm(total=total, initial=done, unit=" images", disable=not show)
    line = "{n_fmt}/{total_fmt} images, {rate_noinv_fmt}, {remaining} left\n"
    return tqdm(total=total, initial=done, unit=" images", disable=not show, mininterval=10, bar_format=line)


def _cores() -> int:
    return len(os.sched_getaffinity(0))  # a Slurm job may not have all of the machine's


def _open(src: str, dst: str) -> Source:
    inner, outer = (fsspec.core.url_to_fs(url)[1].rstrip("/") + "/" for url in (dst, src))
    if inner.startswith(outer):
        raise UserError(f"{dst} lies inside the source {src}: choose a folder outside of it")
    return open_folder(src)


def _checked(options: Options) -> Options:
    square_side(options.max_tokens)
    if not 0 <= options.holdout < 1:
        raise UserError(f"holdout is the share of images to set aside, at least 0 and below 1, not {options.holdout}")
    if options.images_per_shard < 1:
        raise UserError(f"images_per_shard must be at least 1, not {options.images_per_shard}")
    return options


def _divide(source: Source, dst: str, holdout: float) -> dict[str, tuple[Entry, ...]]:
    """URL of each dataset, ``dst`` first, and its images in order of id, which is a fixed shuffle of the keys."""
    entries = sorted(source.entries, key=lambda entry: entry.id)
    held = round(holdout * len(entries))
    if holdout and not 0 < held < len(entries):
        raise UserError(f"holdout {holdout} sets aside {held} of {len(entries)} images: choose another share")
    order = np.argsort(words64(0, Purpose.HOLDOUT, 0, [entry.id for entry in entries]), kind="stable")
    chosen = set(order[:held].tolist())
    datasets = {dst: tuple(entry for i, entry in enumerate(entries) if i not in chosen)}
    if held:
        datasets[f"{dst}/holdout"] = tuple(entry for i, entry in enumerate(entries) if i in chosen)
    return datasets


def _finished(dst: str, options: Options) -> bool:
    """Whether ``dst`` is complete; if it is not begun, begins it. Raises UserError if it was begun with others."""
    record = f"{dst}/parts/options.json"
    finished = _exists(f"{dst}/{FILE}")
    if finished:
        begun = Options.of(Manifest.load(dst).header)
    elif _exists(record):
        begun = Options(**json.loads(read(record)))
    else:
        put(record, json.dumps(asdict(options)).encode())
        return False
    for name, value in asdict(begun).items():
        if (now := getattr(options, name)) != value:
            raise UserError(
                f"{dst} was begun with another {name} ({value}, now {now}): "
                "give the same options and source as then, or another folder"
            )
    return finished


def _commit(
    src: str,
    datasets: dict[str, tuple[Entry, ...]],
    tasks: list[ShardTask],
    options: Options,
    codec: Codec,
    classes: tuple[str, ...],
) -> None:
    """From the records: the list of skipped images, then the manifests, that of ``dst`` last."""
    parts = {task: json.loads(read(task.part)) for task in tasks}
    skipped = sorted((s for part in parts.values() for s in part["skipped"]), key=lambda s: s["source"])
    if skipped:
        put(f"{next(iter(datasets))}/skipped.json", json.dumps(skipped, ensure_ascii=False, indent=1).encode())
    for url in reversed(datasets):
        mine = [part for task, part in parts.items() if task.dataset == url]
        indexes = [ShardIndex.from_record(part["index"]) for part in mine if part["index"]["samples"]]
        if not indexes:
            first = skipped[0]
            raise UserError(
                f"none of the {len(datasets[url])} images of {src} that go to {url} could be read, such as "
                f"{first['source']} ({first['reason']}): check the source, then write to another folder"
            )
        write_manifest(
            url,
            indexes,
            codec={"name": codec.name, "digest": codec.digest, "scale": codec.scale},
            dtype=DTYPE,
            max_tokens=options.max_tokens,
            classes=classes,
            skipped=sum(len(part["skipped"]) for part in mine),
            source={
                "digest": options.source,
                "images_per_shard": options.images_per_shard,
                "holdout": options.holdout,
            },
        )


def _clean(datasets: dict[str, tuple[Entry, ...]]) -> None:
    """Removes the records, and what killed writers left of files they had not finished."""
    for url in datasets:
        fs, root = fsspec.core.url_to_fs(url)
        fs.invalidate_cache()
        if fs.exists(f"{root}/parts"):
            fs.rm(f"{root}/parts", recursive=True)
        for path in fs.find(root):
            if path.endswith(".tmp"):
                fs.rm_file(path)


def _exists(url: str) -> bool:
    fs, path = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return fs.exists(path)
