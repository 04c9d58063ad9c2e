"""The plan: every image exactly once per epoch, even token totals, no bias, and frozen arithmetic."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sharding.errors import UserError
from data_sharding.plan.plan import Plan, Segment
from data_sharding.plan.size_presets import open_preset
from data_sharding.plan.view_sizes import CROP
from fitv2_scale.bench.bias_figures import bias
from tests.support.plans import manifest, plan_of


@settings(max_examples=60)
@given(samples=st.integers(1, 400), frames=st.integers(1, 30), data=st.data(), seed=st.integers(0, 2**64 - 1))
def test_every_image_exactly_once_an_epoch(samples, frames, data, seed):
    images = data.draw(st.integers(1, samples))
    m = manifest(samples, frames)
    plan = plan_of(m, seed, images, "mixed")
    seen: dict[int, list[int]] = {}
    for step in range(-(-3 * samples // images) + plan.window_steps(0)):
        s = plan.step(step)
        assert len(s.sample_id) == images
        assert np.array_equal(m.sample_id[s.row], s.sample_id) and np.array_equal(m.label[s.row], s.label)
        for epoch, image in zip(s.epoch.tolist(), s.sample_id.tolist(), strict=True):
            seen.setdefault(epoch, []).append(image)
    everything = sorted(m.sample_id.tolist())
    for epoch in range(3):
        assert sorted(seen[epoch]) == everything


def test_steps_hold_nearly_equal_token_totals():
    plan = plan_of(manifest(6000, 60), 0, 32, "mixed")
    totals = np.array([plan.step(k).tokens.sum() for k in range(plan.window_steps(0))])
    by_chance = np.sqrt(32) * plan.step(0).tokens.std()
    assert totals.std() < 0.05 * by_chance


def test_even_totals_leave_no_trend_and_no_clumps():
    """One-sided: classes and lengths in a step are no more dispersed than chance, and neither follows the step index.

    A plan sorted by length fails both, as the last lines show.
    """
    plan = plan_of(manifest(12000, 200), 3, 24, "resize")
    steps = [plan.step(k) for k in range(plan.window_steps(0) * 2)]

    def statistics(steps):
        counts = np.array([np.bincount(s.label, minlength=10) for s in steps])
        expected = counts.mean(0)
        dispersion = ((counts - expected) ** 2 / expected).sum() / ((len(steps) - 1) * 9)
        lengths = np.array([s.tokens.mean() for s in steps])
        variance = lengths.var() / (np.concatenate([s.tokens for s in steps]).var() / 24)
        index = np.arange(len(steps))
        # Against the spread that chance would give: the even totals themselves hardly vary.
        trend = abs(np.corrcoef(index, lengths)[0, 1]) * np.sqrt(variance * len(steps))
        class_trend = max(abs(np.corrcoef(index, counts[:, c])[0, 1]) for c in range(10)) * np.sqrt(len(steps))
        return dispersion, variance, trend, class_trend

    dispersion, variance, trend, class_trend = statistics(steps)
    bound = 1 + 4 * np.sqrt(2 / ((len(steps) - 1) * 9))  # four standard deviations of a chi-square over its mean
    assert dispersion < bound and variance < bound and trend < 4 and class_trend < 4.5
    images = SimpleNamespace(**{c: np.concatenate([getattr(s, c) for s in steps]) for c in ("label", "tokens")})
    by_length = np.argsort(images.tokens).reshape(-1, 24)
    bad = [SimpleNamespace(label=images.label[i], tokens=images.tokens[i]) for i in by_length]
    assert statistics(bad)[1] > bound and statistics(bad)[2] > 4


def test_order_depends_on_seed_and_epoch():
    m = manifest(120, 12)

    def epoch(seed, e):
        plan = plan_of(m, seed, 12, "mixed")
        return [plan.step(k).sample_id.tolist() for k in range(10 * e, 10 * e + 10)]

    orders = [epoch(seed, e) for seed, e in ((1, 1), (1, 2), (2, 1), (2, 2))]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_views_and_flips():
    m = manifest(5000, 50)
    has_crop = m.size[:, CROP, 0] > 0
    for views, share in (("mixed", 0.5), ("crop", 1.0), ("resize", 0.0)):
        plan = plan_of(m, 0, 50, views)
        steps = [plan.step(k) for k in range(100)]
        rows, view, flip = (np.concatenate([getattr(s, c) for s in steps]) for c in ("row", "view", "flip"))
        assert (view[has_crop[rows]] == CROP).mean() == pytest.approx(share, abs=0.05)
        assert not (view[~has_crop[rows]] == CROP).any()
        assert flip.mean() == pytest.approx(0.5, abs=0.03)
        assert np.array_equal(np.concatenate([s.tokens for s in steps]), m.size[rows, view].astype(int).prod(-1))


def test_golden_digest_freezes_the_arithmetic():
    """If this fails, runs in progress would train on other images: raise PLANNER_VERSION, then renew the digest."""
    plan = plan_of(manifest(1000, 30, seed=9), (1 << 63) + 5, 24, "mixed")
    digest = hashlib.sha256()
    for k in range(100):
        s = plan.step(k)
        for column in (s.epoch, s.sample_id, s.view, s.flip, s.tokens):
            digest.update(column.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "fe5c50bf7db010d8"
    assert plan.hash[:16] == "2ef3e9e2c0997eae"


def test_the_cursor_is_small_and_tells_the_position():
    plan = plan_of(manifest(100, 10), 0, 30, "mixed")
    cursor = plan.cursor(7)
    assert (cursor.epoch, cursor.window, cursor.images) == ([2], 2, [210])
    assert cursor.plan_hash == plan.hash != plan_of(manifest(100, 10), 1, 30, "mixed").hash


def test_a_batch_larger_than_the_dataset_is_refused():
    with pytest.raises(UserError, match="batch.images is 11, but memory holds 10 images"):
        plan_of(manifest(10), 0, 11, "mixed")


# Several datasets, and changes during a run


@settings(max_examples=60)
@given(
    samples=st.lists(st.integers(10, 80), min_size=1, max_size=3),
    changes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), max_size=3),
    data=st.data(),
)
def test_nothing_is_lost_or_repeated_through_changes_of_batch_and_weights(samples, changes, data):
    """Each dataset's images come exactly once an epoch, its epochs one after the other, however the mix changes."""
    manifests = [manifest(n, 5, seed=i) for i, n in enumerate(samples)]
    weights = st.tuples(*[st.integers(0, 5)] * len(samples)).filter(any)
    plan = Plan(manifests, 7, "mixed", [Segment(0, 4, data.draw(weights))])
    step = 0
    for advance, images in changes:
        step += advance
        plan = plan.continued(plan.cursor(step), step, Segment(0, images, data.draw(weights)))
    taken = [[] for _ in samples]
    last = plan.schedule[-1].start + 20
    last = plan.next_boundary(last)
    for k in range(last):
        s = plan.step(k)
        assert len(s.tokens) == plan.schedule[plan.segment_at(k)].images
        for d, epoch, row in zip(s.dataset.tolist(), s.epoch.tolist(), s.row.tolist(), strict=True):
            taken[d].append((epoch, row))
    for d, n in enumerate(samples):
        whole, part = divmod(len(taken[d]), n)
        assert len(set(taken[d])) == len(taken[d])
        assert {pair for pair in taken[d] if pair[0] < whole} == {(e, r) for e in range(whole) for r in range(n)}
        assert sum(epoch == whole for epoch, _ in taken[d]) == part
    assert plan.consumed(last) == [len(t) for t in taken] and plan.total_images(last) == sum(map(len, taken))


def test_a_change_begins_at_the_next_window_and_keeps_the_past():
    plan = plan_of(manifest(100, 10), 0, 10)
    changed = plan.continued(plan.cursor(13), 13, Segment(0, 25, (1,)))
    assert [(s.start, s.images) for s in changed.schedule] == [(0, 10), (20, 25)]
    for k in range(20):
        assert np.array_equal(plan.step(k).sample_id, changed.step(k).sample_id)
    again = plan.continued(changed.cursor(30), 30, Segment(0, 25, (1,)))
    assert [again.step(k).sample_id.tolist() for k in range(18, 40)] == [
        changed.step(k).sample_id.tolist() for k in range(18, 40)
    ]
    at_boundary = plan.continued(plan.cursor(20), 20, Segment(0, 5, (1,)))
    assert [(s.start, s.images) for s in at_boundary.schedule] == [(0, 10), (20, 5)]


def test_weights_are_kept_and_ids_are_distinct():
    """The same pictures in two sets, 1 to 3: weights hold over every range; no id or random number coincides."""
    twice = [manifest(300, 10), manifest(300, 10)]
    plan = Plan(twice, 0, "mixed", [Segment(0, 16, (1, 3))])
    dataset = np.concatenate([plan.step(k).dataset for k in range(plan.window_steps(0) * 4)])
    assert dataset.mean() == pytest.approx(0.75, abs=0.01)
    ids = [np.unique(np.concatenate([s.sample_id[s.dataset == d] for s in map(plan.step, range(150))])) for d in (0, 1)]
    assert len(ids[0]) == len(ids[1]) == 300 and not np.intersect1d(*ids).size
    with pytest.raises(UserError, match="give one for each of the 2 datasets"):
        Plan(twice, 0, "mixed", [Segment(0, 16, (1,))])


@pytest.mark.parametrize("preset", ["imagenet256", "imagenet1024"])
def test_even_totals_do_not_bias_imagenet_like_steps(preset):
    plan = Plan([open_preset(f"preset:{preset}", images=140_000)], 0, "mixed", [Segment(0, 256, (1,))])
    for name, test in bias(plan, preset, 512)["tests"].items():
        assert test["statistic"] < test["bound"] < test["sorted"], name
