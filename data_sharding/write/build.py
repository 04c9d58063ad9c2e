"""Building a dataset: items to samples to shards, in parallel, resumable, with the same bytes every time.

Which item goes into which shard depends on the source and the options only. Each shard is written as a whole by one
process, which then writes a record of it into ``parts/``. A writer that is started again skips the shards that have a
record, so it continues where it was killed. When all records exist, the manifests are written from them and ``parts/``
is removed.

    DST/parts/options.json, software.json       what this unfinished dataset is written from and by, see ``begun.py``
    DST/parts/shard-000000.tar.zst.json         {"index": {"name": …, "frames": [[…], …], …}, "skipped": […],
                                                 "several_frames": 0, "options": "5f0c…"}
    DST/skipped.json                            [{"source": "cat/3.jpg", "reason": "OSError: image file is trunc…"}]
    DST/source.json                             see ``write_report.py``
    DST/holdout/                                with holdout > 0: a dataset of its own

Several tasks (such as those of ``srun``) may build one dataset. They claim nothing, so no lease can expire and no clock
is trusted: task p of n writes shards p, p+n, p+2n, … and then those of the others that have no record yet, from their
far ends. So the shards of a killed task are written by the rest, and a wrong number of tasks (SLURM_NTASKS in a batch
script that starts one) does no harm. Of two tasks that write the same shard, each a whole file, the later one stops as
soon as it sees the record (see ``shard_task.py``). A task that finds all records commits; two that do so at the same
time write the same files.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic

import numpy as np

from data_sharding.errors import UserError
from data_sharding.format.codec import SD_VAE, CodecRecord
from data_sharding.format.manifest import FILE, Manifest, write_manifest
from data_sharding.format.shard import ShardIndex
from data_sharding.format.stored_array import DTYPE
from data_sharding.rng import Purpose, words64
from data_sharding.storage.files import exists, put, read
from data_sharding.storage.json_bytes import from_json
from data_sharding.worker_pool import cores, order_for_slurm_task, progress_bar, run_tasks
from data_sharding.write.begun import Options, begin
from data_sharding.write.cleanup import clean
from data_sharding.write.findings import Findings
from data_sharding.write.shard_task import ItemT, Maker, Part, ShardTask, write_shard
from data_sharding.write.write_report import SKIPPED, WriteReport, put_counts, report_of


@dataclass(frozen=True)
class Inputs(Generic[ItemT]):
    """What is to be written; the images of ``findings.left_out`` are not, but listed in skipped.json."""

    items: tuple[ItemT, ...]
    classes: tuple[str, ...]
    findings: Findings


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
    begun = begin(dst, options, vae=codec["name"] == SD_VAE)
    tasks = [
        ShardTask(
            dst,
            url,
            f"shard-{i:06d}.tar.zst",
            members[at : at + options.images_per_shard],
            inputs.classes,
            make,
            options.digest,
            begun,
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
        clean(url)
    return report_of(urls, made, started)


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
    again = "remove it, and start again: its shard is then written again"
    parts = [(task.dataset, from_json(read(task.part), task.part, Part, again)) for task in tasks]
    root = next(iter(datasets))
    if others := [part for _, part in parts if part.get("options", options.digest) not in options.digests]:
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
