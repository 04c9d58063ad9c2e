"""Substitutes of frames that cannot be read: which images they are; all other images stay."""

import json

import numpy as np
import pytest

from data_sharding.errors import DataError
from data_sharding.plan.plan import Plan, Segment
from data_sharding.plan.token_grid import TokenGrid
from data_sharding.plan.view_sizes import CROP, RESIZE
from data_sharding.stream.frames import read_frame
from data_sharding.stream.substitutes import LostFrame, Substitutes, frame_of
from tests.support.loaders import loader


def tokens(m, row, view):
    return int(m.size[row, view].astype(int).prod())


def test_substitutes_are_as_long_or_the_nearest_shorter(manifest):
    substitutes = Substitutes([manifest]).with_record(record_of(Substitutes([manifest]), 1, 3))
    lost = {1, 3}
    rows = [r for f in lost for r in range(*manifest.frame_first[f : f + 2])]
    readable = [r for r in range(len(manifest.sample_id)) if frame_of(manifest, r) not in lost]
    assert substitutes.images == len(rows) and substitutes.fraction() == len(rows) / 240
    exact = 0
    for row in rows:
        for view in (RESIZE, CROP):
            wanted = tokens(manifest, row, view)
            if not wanted:
                continue
            substitute = substitutes.row(0, row, view)
            assert substitute in readable
            possible = [n for r in readable if 0 < (n := tokens(manifest, r, view)) <= wanted]
            assert tokens(manifest, substitute, view) == max(possible)
            exact += tokens(manifest, substitute, view) == wanted
    assert exact > len(rows) / 2
    assert all(substitutes.row(0, row, RESIZE) == row for row in readable)
    # Different images get different substitutes, as far as lengths allow.
    assert len({substitutes.row(0, row, RESIZE) for row in rows}) > len(rows) / 3


def test_with_larger_patches_lengths_are_of_the_networks_tokens(manifest):
    """Views of as many stored tokens may have more of the network's than the planned one, for which packs have no
    room."""
    substitutes = Substitutes([manifest], TokenGrid(patch=4))
    substitutes = substitutes.with_record(record_of(substitutes, 1, 3))
    size, equal, replaced = manifest.size.astype(int), 0, 0
    for frame in (1, 3):
        for row in range(*manifest.frame_first[frame : frame + 2]):
            for view in (RESIZE, CROP):
                if size[row, view].any():
                    other = size[substitutes.row(0, row, view), view]
                    assert 0 < (other // 2).prod() <= (size[row, view] // 2).prod()
                    equal += (other // 2).prod() == (size[row, view] // 2).prod()
                    replaced += 1
    assert equal == replaced > 20


def test_choice_depends_on_the_key_alone(manifest):
    empty = Substitutes([manifest])
    a, b, other = record_of(empty, 1, 3), record_of(empty, 3, 1), record_of(empty, 1, 3, seed=1)
    assert a == b and a != other
    assert record_of(empty.with_record(a), 1, 3)["frames"] == []  # they have substitutes already


def test_a_frame_is_lost_wherever_its_dataset_is_listed(manifest):
    """The same dataset twice, or two copies of it: the record names the digest, which both have."""
    twice = Substitutes([manifest, manifest])
    for listed in (0, 1):
        lost = [LostFrame(listed, 1, "missing"), LostFrame(listed, 3, "missing")]
        record = json.loads(json.dumps(twice.next_record(lost, 0)))
        assert [frame["frame"] for frame in record["frames"]] == [1, 3]
        both = twice.with_record(record)
        row = np.array([manifest.frame_first[1]])
        assert both.is_lost(np.array([0]), row).tolist() == both.is_lost(np.array([1]), row).tolist() == [True]
        assert both.frames.keys() == {(0, 1), (0, 3), (1, 1), (1, 3)}
        assert both.fraction() == Substitutes([manifest]).with_record(record).fraction()
        assert both.next_record(lost, 0)["frames"] == []
    at_once = twice.next_record([LostFrame(1, 1, "missing"), LostFrame(0, 1, "missing")], 0)
    assert len(at_once["frames"]) == 1  # met in both listings by two ranks
    alone = Substitutes([manifest]).next_record([LostFrame(0, 1, "missing")], 0)
    assert at_once["frames"] == alone["frames"]


def test_a_rare_length_is_found_in_a_search_of_everything(manifest, monkeypatch):
    monkeypatch.setattr("data_sharding.stream.substitutes._DRAWS", 1)
    substitutes = Substitutes([manifest]).with_record(record_of(Substitutes([manifest]), 2))
    monkeypatch.setattr("data_sharding.stream.substitutes._BLOCK", 17)
    test_substitutes_are_as_long_or_the_nearest_shorter(manifest)
    for row in range(*manifest.frame_first[2:4]):
        assert frame_of(manifest, substitutes.row(0, row, RESIZE)) != 2


def test_an_unreadable_substitute_is_replaced(manifest):
    first = Substitutes([manifest])
    first = first.with_record(record_of(first, 0))
    rows = range(*manifest.frame_first[:2])
    hit = next(r for r in rows if frame_of(manifest, first.row(0, r, RESIZE)) == 4)
    then = first.with_record(record_of(first, 4))
    assert frame_of(manifest, then.row(0, hit, RESIZE)) not in (0, 4)
    unmoved = next(r for r in rows if frame_of(manifest, first.row(0, r, RESIZE)) not in (0, 4))
    assert then.row(0, unmoved, RESIZE) == first.row(0, unmoved, RESIZE)


def test_without_a_short_enough_image_it_is_an_error(manifest):
    frames = len(manifest.frame_shard)
    with pytest.raises(DataError, match="cannot be read, and no readable image is short enough"):
        record_of(Substitutes([manifest]), *range(frames))


def test_all_other_images_are_untouched(dataset, manifest):
    plan = Plan([manifest], 5, "mixed", [Segment(0, 12, (1,))])
    substitutes = Substitutes([manifest]).with_record(record_of(Substitutes([manifest]), 2))
    with loader(plan, steps=range(25)) as plain, loader(plan, steps=range(25), substitutes=substitutes) as replaced:
        counted, label_of = 0, labels_by_latents(manifest)
        for a, b in zip(plain, replaced, strict=True):
            images = plan.step(a.step)
            lost = dict(
                zip(images.sample_id.tolist(), substitutes.is_lost(images.dataset, images.row).tolist(), strict=True)
            )
            assert b.step_substituted == sum(lost.values()) and a.step_substituted == 0
            assert (a.id_sum, a.step_id_sum) == (b.id_sum, b.step_id_sum)
            assert a.step_cost_max == b.step_cost_max and len(a.packs) == len(b.packs)
            for p, q in zip(a.packs, b.packs, strict=True):
                assert np.array_equal(p.sample_id, q.sample_id) and np.array_equal(p.epoch, q.epoch)
                assert np.array_equal(p.weight, q.weight)
                for slot in np.flatnonzero(p.weight):
                    if p.layout.tokens == q.layout.tokens:
                        assert np.array_equal(p.layout.cu_seqlens, q.layout.cu_seqlens)
                    x, y = (k.latents[slice(*k.layout.cu_seqlens[slot : slot + 2])] for k in (p, q))
                    if lost[int(p.sample_id[slot])]:
                        counted += 1
                        assert not np.array_equal(x, y) and len(y) <= len(x)
                        assert q.label[slot] == label_of[y.tobytes()]  # its own, not that of the lost image
                    else:
                        assert np.array_equal(x, y) and p.label[slot] == q.label[slot]
    assert counted > 20


def labels_by_latents(manifest) -> dict[bytes, int]:
    """The label that the dataset stores with each image, by the bytes of any of its views."""
    samples = [sample for f in range(len(manifest.frame_shard)) for sample in read_frame(manifest, f)]
    return {view[flip].tobytes(): s.label for s in samples for view in s.views.values() for flip in (0, 1)}


def record_of(substitutes: Substitutes, *frames: int, seed: int = 0) -> dict:
    record = substitutes.next_record([LostFrame(0, f, f"frame {f}") for f in frames], seed)
    return json.loads(json.dumps(record))  # as it is stored
