"""Packed batches in one call: every image once in an epoch, with the latents that are stored."""

import numpy as np
import pytest

from data_sharding.errors import DataError, UserError
from data_sharding.stream.frames import read_frame
from data_sharding.stream.packed_batches import packed_batches

IMAGES, STEPS = 24, 10  # an epoch of the dataset's 240


def batches_of(dataset: str, steps: range, rank: int = 0, ranks: int = 1) -> list:
    options = {"images": IMAGES, "max_tokens": 256, "hidden": 32, "seed": 3}
    with packed_batches(dataset, steps=steps, rank=rank, nodes=(ranks,), **options) as batches:
        return list(batches)


def images_in(batch) -> dict[int, np.ndarray]:
    """Latents (tokens, 16) of each image, by id."""
    return {
        int(pack.sample_id[slot]): pack.latents[slice(*pack.layout.cu_seqlens[slot : slot + 2])]
        for pack in batch.packs
        for slot in np.flatnonzero(pack.weight)
    }


def test_an_epoch_on_two_ranks_holds_every_stored_image_once(dataset, manifest):
    stored = {s.id: s for f in range(len(manifest.frame_shard)) for s in read_frame(manifest, f)}
    ranks = [batches_of(dataset, range(STEPS), rank, ranks=2) for rank in (0, 1)]
    found = {}
    for batches in zip(*ranks, strict=True):
        step = [item for batch in batches for item in images_in(batch).items()]
        assert len(step) == IMAGES and len({batch.step for batch in batches}) == 1
        found |= dict(step)
    assert found.keys() == stored.keys()
    for id, latents in found.items():
        flips = [view[flip].reshape(-1, 16) for view in stored[id].views.values() for flip in (0, 1)]
        assert any(np.array_equal(latents, flip) for flip in flips)


def test_a_resumed_loop_gets_the_same_packs(dataset):
    whole, rest = batches_of(dataset, range(6)), batches_of(dataset, range(4, 6))
    for a, b in zip(whole[4:], rest, strict=True):
        assert a.step == b.step
        for p, q in zip(a.packs, b.packs, strict=True):
            assert np.array_equal(p.latents, q.latents) and np.array_equal(p.sample_id, q.sample_id)


def test_bad_arguments_are_one_sentence(dataset, tmp_path):
    with pytest.raises(DataError, match="there is no dataset at"):
        packed_batches(str(tmp_path), images=12, max_tokens=256, steps=range(1))
    with pytest.raises(UserError, match="batch.images is 1000, but .* holds 240 images"):
        packed_batches(dataset, images=1000, max_tokens=256, steps=range(1))


def test_without_a_rank_it_is_the_first_and_only_one(dataset):
    options = {"images": IMAGES, "max_tokens": 256, "steps": range(2)}
    told = options | {"rank": 0, "nodes": (1,), "seed": 0}
    with packed_batches(dataset, **options) as short, packed_batches(dataset, **told) as long:
        for a, b in zip(short, long, strict=True):
            assert list(images_in(a)) == list(images_in(b)) and len(images_in(a)) == IMAGES
