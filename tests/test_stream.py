"""The loader: what a rank gets is what the plan says, bit for bit, and its thread ends when it should."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data_sharding.deal import Cost, Shape
from data_sharding.errors import DataError
from data_sharding.frames import read_frame
from data_sharding.manifest import Manifest
from data_sharding.plan import Plan
from data_sharding.stream import FrameCache, Loader

COST, SHAPE = Cost(192, 1), Shape(128, 12, 16)


@pytest.fixture
def plan(dataset):
    return Plan(Manifest.load(dataset), seed=5, images=12, views="mixed")


def loader(plan, rank=0, ranks=1, steps=range(4), cache_bytes=1 << 30):
    return Loader(plan, COST, SHAPE, rank, ranks, steps, cache_bytes)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_packs_hold_the_planned_images(plan, ranks):
    manifest = plan.manifest
    by_id = {s.id: s for f in range(len(manifest.frame_shard)) for s in read_frame(manifest, f)}
    loaded = []
    for rank in range(ranks):
        with loader(plan, rank, ranks) as batches:
            loaded.append(list(batches))
    for step in range(4):
        expected = plan.step(step)
        found = set()
        assert len({len(batches[step].packs) for batches in loaded}) == 1
        assert (sum(b[step].id_sum for b in loaded) - loaded[0][step].step_id_sum) % 2**64 == 0
        for pack in (p for batches in loaded for p in batches[step].packs):
            layout = pack.layout
            assert layout.cu_seqlens[-1] == SHAPE.tokens and np.diff(layout.cu_seqlens).max() <= SHAPE.max_seqlen
            assert not pack.latents[layout.tokens :].any()
            real = np.flatnonzero(pack.weight)
            assert np.array_equal(pack.weight[real], np.full(len(real), 1 / 12, np.float32))
            for slot in real:
                same_id, same_epoch = expected.sample_id == pack.sample_id[slot], expected.epoch == pack.epoch[slot]
                (i,) = np.flatnonzero(same_id & same_epoch)
                found.add(int(i))
                sample = by_id[int(pack.sample_id[slot])]
                array = sample.views["crop" if expected.view[i] else "resize"][expected.flip[i]]
                start, end = layout.cu_seqlens[slot : slot + 2]
                assert np.array_equal(pack.latents[start:end], array.reshape(-1, 16).astype(np.float32))
                rows, columns = array.shape[:2]
                assert layout.positions[start:end].tolist() == [[r, c] for r in range(rows) for c in range(columns)]
                assert pack.label[slot] == sample.label and (layout.image[start:end] == slot).all()
                assert np.array_equal(layout.place[start:end], np.arange(end - start))
        assert found == set(range(12))


def test_resuming_gives_the_same_batches(plan):
    with loader(plan, steps=range(6)) as whole, loader(plan, steps=range(3, 6)) as rest:
        for a, b in zip(list(whole)[3:], rest, strict=True):
            assert a.step == b.step
            for p, q in zip(a.packs, b.packs, strict=True):
                assert np.array_equal(p.latents, q.latents) and np.array_equal(p.sample_id, q.sample_id)


def test_cache_is_bounded_and_spares_reads(plan, monkeypatch):
    reads = []
    monkeypatch.setattr("data_sharding.stream.read_frame", lambda m, f: reads.append(f) or read_frame(m, f))
    cache = FrameCache(plan.manifests, max_bytes=1 << 30)
    with ThreadPoolExecutor(2) as pool:
        cache.load([(0, 0), (0, 1)], pool)
        cache.load([(0, 1), (0, 0)], pool)
        assert sorted(reads) == [0, 1]
        small = FrameCache(plan.manifests, max_bytes=1)
        held = small.load([(0, 0), (0, 1), (0, 2)], pool)
        assert len(held) == 3 and len(small._frames) == 1


def test_an_error_comes_in_its_place_and_the_thread_ends(plan, monkeypatch):
    monkeypatch.setattr("data_sharding.stream.read_frame", lambda m, f: (_ for _ in ()).throw(DataError("gone")))
    with loader(plan) as batches, pytest.raises(DataError, match="gone"):
        next(iter(batches))
    assert not [t for t in threading.enumerate() if t.name == "loader"]


def test_leaving_early_ends_the_thread(plan):
    before = time.monotonic()
    with loader(plan, steps=range(10**6)) as batches:
        next(iter(batches))
    assert time.monotonic() - before < 10
    assert not [t for t in threading.enumerate() if t.name == "loader"]
