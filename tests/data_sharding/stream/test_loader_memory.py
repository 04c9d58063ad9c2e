"""The loader's memory: within the stated bound, as the system counts it, in a process of its own."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_sharding.format.manifest import Manifest, write_manifest
from data_sharding.format.shard import Sample, ShardBuilder
from data_sharding.format.stored_array import DTYPE
from data_sharding.plan.balance import Cost
from data_sharding.plan.pack_layout import PackShape
from data_sharding.plan.plan import Plan, Segment
from data_sharding.stream.loader import Loader

IMAGES, BATCH = 2000, 8
CACHE, PREFETCH = 16 << 20, 24 << 20
ALLOCATOR, UNDER_WAY = 1.75, 8 << 20  # the factor that Loader's docstring states, and some; frames being read


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> str:
    """260 MB in memory, little on disk."""
    url, indexes = str(tmp_path_factory.mktemp("large")), []
    views = {view: np.zeros((2, 32, 32, 16), DTYPE) for view in ("resize", "crop")}
    for first in range(0, IMAGES, 500):
        builder = ShardBuilder(f"shard-{len(indexes):06d}.tar.zst")
        for i in range(first, first + 500):
            builder.add(Sample(i, 0, views), class_name="c", source=str(i), pixels=None)
        data, index = builder.finish()
        Path(url, index.name).write_bytes(data)
        indexes.append(index)
    codec = {"name": "dct", "digest": "00", "scale": 1.0}
    write_manifest(
        url, indexes, codec=codec, dtype="float16", max_tokens=1024, classes=("c",), skipped=0, source={"digest": "00"}
    )
    return url


def peak_growth(url: str, cache_bytes: int, prefetch_bytes: int) -> tuple[int, int]:
    """Bytes by which the process grew at most, and bytes of the decoded dataset."""
    manifest = Manifest.load(url)
    plan = Plan([manifest], 0, "mixed", [Segment(0, BATCH, (1,))])
    plan.step(0)
    before = status("VmRSS")
    shape = PackShape(BATCH * 1024, BATCH + 9, 1024)
    with Loader(
        plan, Cost(1, 0), {0: [shape]}, 0, (1,), range(300), cache_bytes, prefetch_bytes=prefetch_bytes
    ) as batches:
        for batch in batches:
            assert len(batch.packs) == 1
    return status("VmHWM") - before, int(manifest.frame_raw_bytes.sum())


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def test_the_loader_stays_within_its_bound(large):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        growth, dataset = fresh.submit(peak_growth, large, CACHE, PREFETCH).result()
    assert dataset > 6 * (CACHE + PREFETCH)
    assert growth < ALLOCATOR * (CACHE + PREFETCH) + UNDER_WAY, f"{growth >> 20} MiB"
