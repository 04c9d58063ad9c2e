"""Loaders of conftest's dataset, and the comparison of what they give."""

import numpy as np
import pytest

from data_sharding.format.manifest import Manifest
from data_sharding.plan.balance import Cost
from data_sharding.plan.pack_layout import PackShape
from data_sharding.stream.loader import Loader

COST, SHAPE = Cost(192, 1), PackShape(128, 12, 16)


def loader(plan, rank=0, ranks=1, steps=range(4), cache_bytes=1 << 30, **options):
    return Loader(plan, COST, {0: [SHAPE]}, rank, (ranks,), steps, cache_bytes, **options)


def same(a, b) -> bool:
    return a.step == b.step and all(
        np.array_equal(p.latents, q.latents)
        and np.array_equal(p.sample_id, q.sample_id)
        and np.array_equal(p.label, q.label)
        and np.array_equal(p.layout.cu_seqlens, q.layout.cu_seqlens)
        for p, q in zip(a.packs, b.packs, strict=True)
    )


@pytest.fixture
def manifest(dataset):
    return Manifest.load(dataset)
