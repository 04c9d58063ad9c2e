"""Building a dataset: items to samples to shards, in parallel, resumable, with the same bytes every time.

Which item goes into which shard depends on the source and the options only. Each shard is written as a whole by one
process, which then writes a record of it into ``parts/``. A writer that is started again skips the shards that have a
record, so it continues where it was killed. When all records exist, the manifests are written from them and ``parts/``
is removed.

    DST/parts/options.json                      the options of this unfinished dataset
    DST/parts/shard-000000.tar.zst.json         {"index": {"name": …, "frames": [[…], …], …}, "skipped": […],
                                                 "several_frames": 0, "options": "5f0c…"}
    DST/skipped.json                            [{"source": "cat/3.jpg", "reason": "OSError: image file is trunc…"}]
    DST/source.json                             see ``write_report.py``
    DST/holdout/                                with holdout > 0: a dataset of its own

Several tasks (such as those of ``srun``) may build one dataset. They claim nothing, so no lease can expire and no clock
is trusted: task p of n writes shards p, p+n, p+2n, … and then those of the others that have no record yet, from their
far ends. So the shards of a killed task are written by the rest, and a wrong number of tasks (SLURM_NTASKS in a batch
script that starts one) does no harm. Two tasks that write the same shard write the same bytes, each a whole file; the
later one stops as soon as it sees the record. A task that finds all records commits; two that do so at the same time
write the same files.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Generic

import numpy as np

from data_sharding.errors import UserError
from data_sharding.format.codec import CodecRecord
from data_sharding.format.manifest import FILE, Header, Manifest, write_manifest
from data_sharding.format.shard import DTYPE, ShardIndex
from data_sharding.rng import Purpose, words64
from data_sharding.storage.atomic_write import destination
from data_sharding.storage.files import exists, fs_call, put, read
from data_sharding.storage.filesystems import file_system, is_local
from data_sharding.storage.json_bytes import from_json, to_json
from data_sharding.worker_pool import cores, order_for_slurm_task, progress_bar, run_tasks
from data_sharding.write.findings import Findings
from data_sharding.write.shard_task import ItemT, Maker, ShardTask, write_shard
from data_sharding.write.views import square_side
from data_sharding.write.write_report import SKIPPED, WriteReport, put_counts, report_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Everything that determines a dataset's bytes. ``source`` and ``codec`` are digests, ``holdout`` a fraction."""

    source: str
    codec: str
    max_tokens: int
    images_per_shard: int
    holdout: float

    def __post_init__(self):
        square_side(self.max_tokens)
        if not 0 <= self.holdout < 1:
            raise UserError(
                f"holdout is the fraction of images to set aside: at least 0 and below 1, not {self.holdout}"
            )
        if self.images_per_shard < 1:
            raise UserError(f"images_per_shard must be at least 1, not {self.images_per_shard}")

    @property
    def digest(self) -> str:
        """Of all of them."""
        return blake2b(to_json(asdict(self) | {"holdout": float(self.holdout)}), digest_size=16).hexdigest()

    @classmethod
    def of(cls, header: Header) -> "Options":
        """The options that a finished dataset was written with."""
        source, codec = header.source, header.codec["digest"]
        return cls(source["digest"], codec, header.max_tokens, source["images_per_shard"], source["holdout"])


@dataclass(frozen=True)
class Inputs(Generic[ItemT]):
    """What is to be written; the images of ``findings.left_out`` are not, but listed in skipped.json."""

    items: tuple[ItemT, ...]
    classes: tuple[str, ...]
    findings: Findings


def is_finished(dst: str, options: Options) -> bool:
    """Whether the dataset is complete. Raises UserError if it exists, in whole or part, with other options."""
    record = f"{dst}/parts/options.json"
    if finished := exists(f"{dst}/{FILE}"):
        begun = Options.of(Manifest.load(dst).header)
    elif exists(record):
        begun = Options(**from_json(read(record), record))
    else:
        return False
    for name, value in asdict(begun).items():
        if (now := getattr(options, name)) != value:
            if not finished and _nothing_is_written(dst):
                return False
            remedy = "or give another folder" if finished else f"or remove it (rm -r {dst}), or give another folder"
            raise UserError(
                f"{dst} was started with another {name} ({value}, now {now}): give the same options and source as "
                f"before (with images added, removed or changed it is another one), {remedy}"
            )
    return finished


def build(
    src: str,
    dst: str,
    options: Options,
    inputs: Inputs[ItemT],
    codec: CodecRecord,
    make: Maker[ItemT],
    workers: int | None,
    progress: bool,
) -> int:
    """Writes the missing shards, then the manifests. Returns the number of items that this call encoded or copied.

    ``codec`` is its record in the manifest. Raises UserError if not one item of a dataset could be read, or if other
    tasks saw another source.
    """
    datasets = _divide(inputs.items, dst, options.holdout)
    _begin(dst, options)
    tasks = [
        ShardTask(
            dst,
            url,
            f"shard-{i:06d}.tar.zst",
            members[at : at + options.images_per_shard],
            inputs.classes,
            make,
            options.digest,
        )
        for url, members in datasets.items()
        for i, at in enumerate(range(0, len(members), options.images_per_shard))
    ]
    todo = [task for task in tasks if not exists(task.part)]
    total, left = (sum(len(task.items) for task in some) for some in (tasks, todo))
    made = 0
    with progress_bar(total, total - left, progress, " images") as bar:

        def advance(count: int, fresh: bool) -> None:
            nonlocal made
            made += count * fresh
            bar.update(count)

        run_tasks(order_for_slurm_task(todo), write_shard, cores() if workers is None else workers, advance)
    try:
        _commit(src, datasets, tasks, options, codec, inputs)
    except FileNotFoundError:
        if not exists(f"{dst}/{FILE}"):  # else another task was first, and has removed them
            raise
    return made


def report(dst: str, made: int, started: float) -> WriteReport:
    """Removes the files that only building needed, and reports what was written."""
    urls = [dst, *([f"{dst}/holdout"] if Manifest.load(dst).header.source["holdout"] else [])]
    for url in urls:
        _clean(url)
    return report_of(urls, made, started)


def _begin(dst: str, options: Options) -> None:
    record = f"{dst}/parts/options.json"
    if exists(record):
        _remove_unfinished(dst)  # of a writer that was killed
        if from_json(read(record), record) == asdict(options):
            return
    put(record, to_json(asdict(options)))


def _nothing_is_written(dst: str) -> bool:
    """Whether the unfinished dataset holds no shard: then it may as well start with other options."""
    file_system(dst)[0].invalidate_cache()
    return not any(path.rpartition("/")[2].startswith("shard-") for path in fs_call(dst, "find"))


def _divide(items: Iterable[ItemT], dst: str, holdout: float) -> dict[str, tuple[ItemT, ...]]:
    """{URL: items} of each dataset, ``dst`` first. Items are in order of id, which is a fixed shuffle of the keys."""
    items = sorted(items, key=lambda item: item.id)
    held = round(holdout * len(items))
    if holdout and not 0 < held < len(items):
        raise UserError(f"holdout {holdout} sets aside {held} of {len(items)} images: choose another fraction")
    order = np.argsort(words64(0, Purpose.HOLDOUT, 0, [item.id for item in items]), kind="stable")
    chosen = set(order[:held].tolist())
    datasets = {dst: tuple(item for i, item in enumerate(items) if i not in chosen)}
    if held:
        datasets[f"{dst}/holdout"] = tuple(item for i, item in enumerate(items) if i in chosen)
    return datasets


def _commit(
    src: str,
    datasets: dict[str, tuple[ItemT, ...]],
    tasks: list[ShardTask[ItemT]],
    options: Options,
    codec: CodecRecord,
    inputs: Inputs[ItemT],
) -> None:
    """Writes, from the records, the lists of skipped items and counts, then the manifests, that of ``dst`` last."""
    parts = [(task.dataset, from_json(read(task.part), task.part)) for task in tasks]
    root = next(iter(datasets))
    if others := [part for _, part in parts if part.get("options", options.digest) != options.digest]:
        raise UserError(
            f"{len(others)} of the {len(parts)} shards of {root} were written from another listing of {src}, or with "
            f"other options: its files changed meanwhile; remove {root} (rm -r {root}) and write it again"
        )
    left_out = [skipped._asdict() for skipped in inputs.findings.left_out]
    skipped = sorted([*left_out, *(s for _, part in parts for s in part["skipped"])], key=lambda s: s["source"])
    if skipped:
        put(f"{root}/{SKIPPED}", json.dumps(skipped, ensure_ascii=False, indent=1).encode())
    put_counts(root, inputs.findings, sum(part.get("several_frames", 0) for _, part in parts))
    for url in reversed(datasets):
        mine = [part for dataset, part in parts if dataset == url]
        indexes = [ShardIndex.from_record(part["index"]) for part in mine if part["index"]["samples"]]
        if not indexes:
            first = skipped[0]
            raise UserError(
                f"none of the {len(datasets[url])} images of {src} for {url} could be read, for example "
                f"{first['source']} ({first['reason']}): check the source, then write to another folder"
            )
        write_manifest(
            url,
            indexes,
            codec=codec,
            dtype=DTYPE,
            max_tokens=options.max_tokens,
            classes=inputs.classes,
            skipped=sum(len(part["skipped"]) for part in mine) + (len(left_out) if url == root else 0),
            source={
                "digest": options.source,
                "images_per_shard": options.images_per_shard,
                "holdout": options.holdout,
            },
        )


def _clean(url: str) -> None:
    """Removes the records, and the unfinished files of killed writers."""
    fs, root = file_system(url)
    fs.invalidate_cache()
    if is_local(fs) and exists(f"{url}/parts"):
        _remove(f"{url}/parts", "rm", recursive=True)
    for path in fs_call(url, "find"):  # one by one: "rm" of an object store takes [ and * in the URL for a pattern
        if path.endswith(".tmp") or path.startswith(f"{root}/parts/"):
            _remove(fs.unstrip_protocol(path), "rm_file")


def _remove_unfinished(url: str) -> None:
    """Removes the files that a killed writer had not finished. One that still writes such a file writes it again."""
    fs, _ = file_system(url)
    for path in fs_call(url, "find") if is_local(fs) else ():
        if destination(Path(path)) is not None:
            _remove(fs.unstrip_protocol(path), "rm_file")


def _remove(url: str, method: str, **options) -> None:
    """What cannot be removed stays: NFS keeps a file that somebody has open, and nobody needs it to be gone."""
    try:
        fs_call(url, method, **options)
    except FileNotFoundError:  # removed by another task, or by an attempt whose reply was lost
        pass
    except UserError as error:
        log.warning("%s was not removed: %s", url, error)
