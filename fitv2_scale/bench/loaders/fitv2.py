"""This project's loader, as a training run uses it: threads in the consumer's process, packs converted to tensors."""

from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch

from data_sharding.format.manifest import Manifest, write_manifest
from data_sharding.format.shard import Sample, ShardBuilder
from data_sharding.format.stored_array import DTYPE
from data_sharding.plan.balance import Nodes
from data_sharding.plan.pack_layout import PackShape
from data_sharding.plan.pack_shapes import choose_shapes
from data_sharding.plan.plan import Plan, Segment
from data_sharding.storage.files import put
from data_sharding.stream.batch import Pack
from data_sharding.stream.disk_cache import DiskCache
from data_sharding.stream.frames import FrameReader
from data_sharding.stream.loader import Loader
from fitv2_scale.bench.loaders import Batch, LoaderConfig
from fitv2_scale.bench.workload import COST, PACK_TOKENS
from fitv2_scale.model.to_torch import pack_to_torch

_IMAGES_PER_SHARD = 1000  # as `fitv2 shard write` has it
_CACHE_BYTES, _DISK_BYTES = 5 << 29, 32 << 30  # the defaults of data.cache_gib and data.cache_disk_gib


def write(samples: Iterable[Sample], folder: Path) -> None:
    samples, indexes, classes = iter(samples), [], 0
    while chunk := list(islice(samples, _IMAGES_PER_SHARD)):
        builder = ShardBuilder(f"shard-{len(indexes):06d}.tar.zst")
        for sample in chunk:
            builder.add(sample, class_name=str(sample.label), source=f"{sample.id:016x}", pixels=None)
        data, index = builder.finish()
        put(f"{folder}/{index.name}", data)
        indexes.append(index)
        classes = max(classes, 1 + max(sample.label for sample in chunk))
    write_manifest(
        str(folder),
        indexes,
        codec={"name": "dct", "digest": "random latents", "scale": 1.0},
        dtype=DTYPE,
        max_tokens=256,
        classes=tuple(map(str, range(classes))),
        skipped=0,
        source={"digest": "random latents", "images_per_shard": _IMAGES_PER_SHARD, "holdout": 0.0},
    )


def epochs(config: LoaderConfig) -> Generator[Iterator[Batch]]:
    plan, shapes = open_plan(config, (1,))
    steps, epoch = plan.samples[0] // config.batch, 0
    while True:
        # A new loader for each: at full size an epoch is far larger than the memory for decoded frames, so no epoch
        # must find those of the last one.
        with open_loader(config, plan, shapes, 0, (1,), range(epoch * steps, (epoch + 1) * steps)) as loader:
            yield _batches(loader)
        epoch += 1


def open_plan(config: LoaderConfig, nodes: Nodes) -> tuple[Plan, tuple[PackShape, ...]]:
    plan = Plan([Manifest.load(config.url)], 0, config.views, [Segment(0, config.batch, (1,))])
    window = [plan.step(k).tokens for k in range(plan.window_steps(0))]
    return plan, choose_shapes(window, COST, nodes, PACK_TOKENS, plan.max_seqlen)


def open_loader(
    config: LoaderConfig, plan: Plan, shapes: tuple[PackShape, ...], rank: int, nodes: Nodes, steps: range
) -> Loader:
    return Loader(plan, COST, {0: shapes}, rank, nodes, steps, _CACHE_BYTES, reader=open_reader(config))


def open_reader(config: LoaderConfig) -> FrameReader:
    return FrameReader(cache=DiskCache(config.scratch, _DISK_BYTES) if config.is_s3 else None)


def _batches(loader: Loader) -> Iterator[Batch]:
    for step in loader:
        for pack in step.packs:
            yield to_batch(pack)


def to_batch(pack: Pack) -> Batch:
    made = pack_to_torch(pack, torch.device("cpu"))
    return Batch(made.latents_TC, made.sample_id_I[made.weight_I > 0], pack.layout.tokens)
