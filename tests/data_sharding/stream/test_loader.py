"""The loader: what a rank gets is what the plan says, bit for bit, and its thread ends when it should."""

import threading
import time

import numpy as np
import pytest

from data_sharding.errors import DataError, StorageDown
from data_sharding.format.manifest import Manifest
from data_sharding.plan.plan import Plan, Segment
from data_sharding.storage.retry import RetryPolicy
from data_sharding.stream.frames import FrameReader, UnreadableFrame, read_frame
from data_sharding.stream.loader import Loader, SubstitutesNeeded
from data_sharding.stream.memory_cache import MemoryCache
from data_sharding.stream.substitutes import Substitutes, frame_of
from tests.support.loaders import SHAPE, loader, same
from tests.support.waiting import wait


@pytest.fixture
def plan(dataset):
    return Plan([Manifest.load(dataset)], 5, "mixed", [Segment(0, 12, (1,))])


def test_no_more_is_read_ahead_than_fits(plan, monkeypatch):
    """Once all frames are in memory, packs alone count: two of 128 tokens a step, of 72 bytes each: 16 numbers of two
    bytes, five of eight in the layout."""
    planned, too_far, plan_step = [], threading.Event(), plan.step

    def step(number: int):
        planned.append(number)
        if number > 43:
            too_far.set()
        return plan_step(number)

    monkeypatch.setattr(plan, "step", step)
    with loader(plan, steps=range(60), prefetch_bytes=3 * 2 * 128 * 72) as batches:
        assert [len(next(batches).packs) for _ in range(40)] == [2] * 40
        wait("three steps ahead and the next, which has no room", lambda: planned[-1] >= 43)
        assert not too_far.wait(0.3)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_packs_hold_the_planned_images(plan, ranks):
    (manifest,) = plan.manifests
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
                assert layout.positions[start:end].tolist() == [[0, r, c] for r in range(rows) for c in range(columns)]
                assert pack.label[slot] == sample.label and (layout.image[start:end] == slot).all()
                assert np.array_equal(layout.place[start:end], np.arange(end - start))
        assert found == set(range(12))


def test_resuming_gives_the_same_batches(plan):
    with loader(plan, steps=range(6)) as whole, loader(plan, steps=range(3, 6)) as rest:
        for a, b in zip(list(whole)[3:], rest, strict=True):
            assert a.step == b.step
            for p, q in zip(a.packs, b.packs, strict=True):
                assert np.array_equal(p.latents, q.latents) and np.array_equal(p.sample_id, q.sample_id)


class Reads:
    """A reader that counts, and can be told to wait or to fail."""

    def __init__(self, monkeypatch):
        self.frames: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        plain = FrameReader.read

        def read(reader, manifest, f):
            self.frames.append(f)
            self.gate.wait()
            if self.error:
                raise self.error
            return plain(reader, manifest, f)

        monkeypatch.setattr(FrameReader, "read", read)


@pytest.fixture
def reads(monkeypatch):
    return Reads(monkeypatch)


def test_decoded_frames_are_kept_within_their_bound(plan, reads):
    frames = len(plan.manifests[0].frame_shard)
    with loader(plan, steps=range(20)) as batches:
        list(batches)
        assert sorted(reads.frames) == list(range(frames))
    with loader(plan, steps=range(40), cache_bytes=1, prefetch_bytes=1) as batches:
        list(batches)
        assert len(reads.frames) > 3 * frames and len(batches._cache) == 1


def test_the_cache_drops_the_least_recently_used(plan):
    manifest = plan.manifests[0]
    samples = [FrameReader().read(manifest, f) for f in range(3)]
    cache = MemoryCache(sum(s.nbytes for s in samples) - 1)
    for f in (0, 1):
        cache.put((0, f), samples[f])
    cache.get((0, 0))
    cache.put((0, 2), samples[2])
    assert (0, 0) in cache and (0, 1) not in cache and len(cache) == 2


def held_bytes(batches: Loader) -> int:
    with batches._changed:
        return sum(size for size, _ in batches._ready)


@pytest.mark.parametrize("steps", [1, 3])
def test_prefetch_is_bounded_in_bytes(plan, steps):
    """If no step is taken, as many are prepared as fit; with room for less than one, one is."""
    with loader(plan, steps=range(1000)) as probe:
        next(probe)
        wait("16 steps", lambda: len(probe._ready) == 16)
        time.sleep(0.2)
        one = probe._ready[-1][0]  # all frames are in the cache by then: a batch alone
        assert len(probe._ready) == 16  # the default bound is far away, so the count ends it
    with loader(plan, steps=range(1000), prefetch_bytes=int((steps + 0.5) * one)) as batches:
        for _ in range(30):  # past the first steps, which bring the frames
            next(batches)
        wait("as many steps as fit", lambda: len(batches._ready) == steps)
        time.sleep(0.2)
        assert len(batches._ready) == steps and held_bytes(batches) <= (steps + 0.5) * one
    with loader(plan, steps=range(40), prefetch_bytes=1) as batches:
        assert len(list(batches)) == 40


def test_an_error_is_raised_at_its_step_and_the_thread_ends(plan, reads):
    reads.error = DataError("gone")
    with loader(plan) as batches:
        for _ in range(2):
            with pytest.raises(DataError, match="gone"):
                next(batches)
    assert not [t for t in threading.enumerate() if t.name == "loader"]


def test_leaving_early_ends_the_thread(plan):
    with loader(plan, steps=range(10**6)) as batches:
        next(batches)
    assert not [t for t in threading.enumerate() if t.name == "loader"]


def test_is_ready_waits_for_data(plan, reads):
    reads.gate.clear()
    with loader(plan, steps=range(3)) as batches:
        assert not batches.is_ready(0.05)
        reads.gate.set()
        assert batches.is_ready(300)
        assert len(list(batches)) == 3 and batches.is_ready(0)


def test_frames_are_waited_for_until_the_deadline(plan, reads):
    """0.4 s for the frames of a step, and five attempts of 0.04 s."""
    reads.gate.clear()
    with loader(plan, steps=range(3), reader=FrameReader(retry=RetryPolicy(deadline=0.4, attempt=0.04))) as batches:
        began = time.monotonic()
        with pytest.raises(StorageDown, match="so many frames do not arrive that not all could be tried within 0 s"):
            next(batches)
        assert time.monotonic() - began >= 0.5
        reads.gate.set()
    reads.gate.clear()
    with loader(plan, steps=range(3)) as batches:
        assert not batches.is_ready(0.5)  # longer than the loader looks away
        reads.gate.set()
        assert len(list(batches)) == 3


def test_a_restart_returns_the_same_steps_again(plan):
    with loader(plan, steps=range(8)) as batches:
        first = [next(batches) for _ in range(5)]
        batches.restart(2, Substitutes(plan.manifests))
        again = list(batches)
    assert [b.step for b in again] == list(range(2, 8))
    assert all(same(a, b) for a, b in zip(first[2:], again[:3], strict=True))


def test_all_unreadable_frames_are_named_at_once_and_substitutes_help(plan, reads):
    reads.error = UnreadableFrame("lost")
    needed = {frame_of(plan.manifests[0], row) for row in plan.step(0).row.tolist()}
    with loader(plan, steps=range(1)) as batches:
        with pytest.raises(SubstitutesNeeded, match="lost") as caught:
            next(batches)
        assert {lost.frame for lost in caught.value.lost_frames} == needed
        reads.error = None
        batches.restart(0, Substitutes(plan.manifests))
        assert len(list(batches)) == 1
