"""Dividing a step's images among ranks and packs: evenly, within capacity, and to the nodes that have read them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sharding.errors import UserError
from data_sharding.plan.balance import Cost, assign_packs, partition_over_nodes
from data_sharding.plan.groups import members as members_of
from data_sharding.plan.pack_layout import PackShape
from data_sharding.plan.pack_shapes import choose_shapes, shapes_for_plan
from data_sharding.plan.partition import partition
from data_sharding.plan.plan import Plan, Segment
from data_sharding.plan.size_presets import open_preset
from data_sharding.plan.stratify import assign_to_steps, order_frames
from fitv2_scale.bench.plan_figures import node_reads
from tests.support.plans import COST, manifest, plan_of

lengths = st.lists(st.integers(1, 64), min_size=1, max_size=120).map(lambda x: np.array(x, np.int64))


@settings(max_examples=200)
@given(
    tokens=lengths, ranks=st.one_of(st.integers(1, 64), st.sampled_from([67, 97, 113])), capacity=st.integers(64, 400)
)
def test_every_image_is_in_one_pack_within_capacity(tokens, ranks, capacity):
    shape = PackShape(capacity, -(-capacity // 64) + 3, 64)
    assignment = assign_packs(tokens, COST, (ranks,), [shape]).packs
    assert len(assignment) == ranks and len({len(packs) for packs in assignment}) == 1
    packs = [pack for rank in assignment for pack in rank]
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(tokens)))
    for pack in packs:
        room = capacity - tokens[pack].sum()
        assert room >= 0 and len(pack) + shape.padding_slots(room) <= shape.images
    assert assign_packs(tokens, COST, (ranks,), [shape]).packs[0][0].tolist() == assignment[0][0].tolist()


@settings(max_examples=100)
@given(tokens=lengths, ranks=st.integers(1, 16))
def test_the_slowest_rank_is_within_the_bound_of_greedy_lpt(tokens, ranks):
    """Greedy LPT is at most 4/3 - 1/(3 ranks) of the best, which is at least the mean and the most expensive image."""
    cost = COST.of(tokens)
    loads = [sum(cost[pack].sum() for pack in packs) for packs in [[group] for group in partition(cost, ranks)]]
    merged = np.sort(cost)[::-1][ranks - 1 : ranks + 1]  # with more images than ranks, two of these are on one rank
    least = max(cost.sum() / ranks, cost.max(), merged.sum() if len(merged) == 2 else 0)
    assert max(loads) <= (4 / 3) * least + 1e-9


def test_the_chosen_shape_holds_its_window_in_the_fewest_packs():
    plan = plan_of(manifest(6000, 60), 0, 64, "mixed")
    steps = [plan.step(k).tokens for k in range(plan.window_steps(0))]
    for ranks, most in ((1, 16384), (4, 16384), (4, 512), (5, 1000)):
        shapes = choose_shapes(steps, COST, (ranks,), most, 64)
        steps_packed = [assign_packs(t, COST, (ranks,), shapes) for t in steps]
        room = sum(len(d.packs[0]) * ranks * d.shape.tokens for d in steps_packed)
        fill = sum(t.sum() for t in steps) / room
        assert len(shapes) <= 3 and {d.shape for d in steps_packed} <= set(shapes)
        assert len({len(d.packs[0]) for d in steps_packed}) == 1
        assert shapes[-1].tokens <= most and fill > 0.95, (ranks, most, shapes, fill)


def test_a_step_has_the_same_shapes_wherever_an_attempt_begins():
    """Windows of 256 steps that differ in their mean length; and a run whose batch was changed twice."""
    m = manifest(60_000, 900, seed=3, max_tokens=100)
    plan = plan_of(m, 0, 32)
    for nodes in ((1,), (2,), (4, 4)):
        shapes = shapes_for_plan(plan, COST, nodes, 16384)
        assert shapes.keys() == {0} and 1 <= len(shapes[0]) <= 3
        for step in (10, 256, 300, 700, 1100, 2000):
            assert shapes_for_plan(plan, COST, nodes, 16384, step) == shapes
    once = plan.continued(plan.cursor(300), 300, Segment(0, 64, (1,)))  # from step 512 on, in the third window
    twice = once.continued(once.cursor(600), 600, Segment(0, 32, (1,)))  # from 768 on
    first, second, third = shapes_for_plan(twice, COST, (2,), 16384).values()
    assert shapes_for_plan(plan, COST, (2,), 16384)[0] == first != second
    assert shapes_for_plan(once, COST, (2,), 16384, 300) == {0: first, 1: second}
    assert shapes_for_plan(once, COST, (2,), 16384, 700) == {0: first, 1: second}
    assert shapes_for_plan(twice, COST, (2,), 16384, 5000) == {0: first, 2: third}


def test_impossible_shapes_are_refused():
    steps = [np.full(4, 10)]
    with pytest.raises(UserError, match="5 data-parallel ranks are more than the 4 images"):
        choose_shapes(steps, COST, (5,), 4096, 64)
    with pytest.raises(UserError, match="layout.max_tokens is 32, less than one image of 64"):
        choose_shapes(steps, COST, (1,), 32, 64)
    with pytest.raises(UserError, match="255, less than one image of 64 tokens rounded up to a multiple of 256: raise"):
        choose_shapes(steps, COST, (1,), 255, 64, multiple_of=256)


@pytest.mark.parametrize("multiple_of", [16, 128])
def test_capacities_are_multiples_of_what_is_asked_for(multiple_of):
    """And no larger than they need be: less than one multiple above those of 8, of which one at least is none."""
    plan = Plan([open_preset("preset:imagenet256", images=20_000)], 3, "mixed", [Segment(0, 256, (1,))])
    (fine,), (coarse,) = (shapes_for_plan(plan, COST, (4,), 16384, multiple_of=m).values() for m in (8, multiple_of))
    assert (fine,) == tuple(shapes_for_plan(plan, COST, (4,), 16384).values())
    assert all(shape.tokens % multiple_of == 0 for shape in coarse) and any(s.tokens % multiple_of for s in fine)
    assert 0 <= coarse[-2].tokens - fine[-2].tokens < multiple_of


def test_partition_is_near_the_best_of_all():
    """Against every partition of up to eight images into three groups."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        cost = rng.integers(1, 50, rng.integers(1, 9))
        ways = np.array(np.meshgrid(*[range(3)] * len(cost))).reshape(len(cost), -1)
        loads = np.array([(cost[:, None] * (ways == g)).sum(0) for g in range(3)])
        found = max(int(cost[group].sum()) for group in partition(cost, 3))
        assert found <= loads.max(0).min() * 1.05


@settings(max_examples=100)
@given(tokens=lengths, nodes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_each_node_gets_a_range_of_the_cost_that_it_is_due(tokens, nodes):
    cost = COST.of(tokens)
    members = members_of(partition_over_nodes(cost, tuple(nodes)), sum(nodes))
    assert sorted(np.concatenate(members).tolist()) == list(range(len(tokens)))
    rank, end = 0, 0
    for ranks in nodes:
        mine = np.sort(np.concatenate(members[rank : rank + ranks]))
        assert mine.tolist() == list(range(end, end + len(mine)))
        assert abs(cost[mine].sum() - cost.sum() * ranks / sum(nodes)) <= cost.max()  # half an image at either end
        rank, end = rank + ranks, end + len(mine)


@settings(max_examples=100)
@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=60), seed=st.integers(0, 1000))
def test_frames_in_order_keep_the_mean_length(counts, seed):
    """Whole frames, each once; no first part is further from the mean than the two most unusual frames together."""
    tokens = np.random.default_rng(seed).integers(1, 65, sum(counts))
    starts = np.cumsum([0, *counts[:-1]])
    order = order_frames(starts, tokens)
    assert sorted(order.tolist()) == list(range(len(tokens)))
    begins = order[np.isin(order, starts)]
    ends = [starts[i + 1] if i + 1 < len(starts) else len(tokens) for i in np.searchsorted(starts, begins)]
    assert order.tolist() == [i for a, b in zip(begins, ends, strict=True) for i in range(a, b)]
    excess = np.array([tokens[a:b].sum() - (b - a) * tokens.mean() for a, b in zip(begins, ends, strict=True)])
    assert abs(np.cumsum(excess)).max() <= abs(excess).max() * 1.0001 + 1e-9


@settings(max_examples=60)
@given(steps=st.integers(1, 40), images=st.integers(1, 70), seed=st.integers(0, 1000))
def test_every_lane_gives_each_step_as_many_images(steps, images, seed):
    rng = np.random.default_rng(seed)
    tokens, keyed = rng.integers(1, 65, steps * images), rng.integers(0, 1 << 60, steps * images).astype(np.uint64)
    by_step = assign_to_steps(tokens, keyed, steps)
    assert sorted(by_step.ravel().tolist()) == list(range(steps * images))
    assert (np.diff(by_step) > 0).all()
    lanes = max(1, images // 16)
    for lane in range(1, lanes):
        cut = lane * images // lanes
        assert (by_step[:, :cut] < cut * steps).all() and (by_step[:, cut:] >= cut * steps).all()


@pytest.mark.parametrize("nodes,most", [((8,) * 4, 1.05), ((8, 8, 8, 6), 1.3)])
@pytest.mark.parametrize("preset", ["imagenet256", "imagenet1024"])
def test_nodes_read_little_that_others_read_too(preset, nodes, most):
    """One window; if all ranks were one node, each of the four nodes would read nearly everything."""
    assert node_reads(f"preset:{preset}", nodes, steps=256)["read_over_stored"] <= most


@pytest.mark.parametrize(
    "preset,mean,goals",
    [
        ("imagenet256", 246, {8: (1.002, 0.995), 32: (1.004, 0.993), 64: (1.008, 0.975), 128: (1.024, 0.965)}),
        ("imagenet1024", 704, {8: (1.003, 0.994), 32: (1.020, 0.975), 64: (1.030, 0.970), 128: (1.080, 0.920)}),
    ],
)
def test_balance_and_fill_on_imagenet_like_lengths(preset, mean, goals):
    """On the first steps of the preset at 256 images a step; `fitv2 bench data` has the whole epoch.

    256 tokens on 128 ranks: nearly half of the images have 256 tokens, and too few are short enough to stand beside one
    each, so pairs of 256 and 247 set the slowest rank.
    """
    m = open_preset(f"preset:{preset}", images=70_000)
    plan, cost = Plan([m], 0, "mixed", [Segment(0, 256, (1,))]), Cost(6 * 2304, 1)
    steps = [plan.step(k).tokens for k in range(64)]
    assert np.concatenate(steps).mean() == pytest.approx(mean, abs=4)
    for ranks, (most_imbalance, least_fill) in goals.items():
        shapes = choose_shapes(steps[:48], cost, (ranks,), 16384, plan.max_seqlen)
        imbalance, tokens, room = [], 0, 0
        for lengths in steps[48:]:
            assignment, c = assign_packs(lengths, cost, (ranks,), shapes), cost.of(lengths)
            loads = [sum(int(c[pack].sum()) for pack in rank) for rank in assignment.packs]
            imbalance.append(max(loads) * ranks / sum(loads))
            tokens, room = tokens + lengths.sum(), room + ranks * len(assignment.packs[0]) * assignment.shape.tokens
        assert np.mean(imbalance) <= most_imbalance and tokens / room >= least_fill, (
            ranks,
            np.mean(imbalance),
            tokens / room,
        )


def test_long_images_are_dealt_by_their_cost():
    """Eight images of 64 tokens among 120 of 4: by count each of eight ranks gets 16; by cost each one of the long."""
    tokens = np.array([64] * 8 + [4] * 120)
    cost, shapes = Cost(linear=1, quadratic=1), [PackShape(256, 80, 64)]
    dealt = assign_packs(tokens, cost, (8,), shapes).packs
    assert [sum(int((tokens[pack] == 64).sum()) for pack in packs) for packs in dealt] == [1] * 8
    loads = [sum(int((tokens[pack] + tokens[pack] ** 2).sum()) for pack in packs) for packs in dealt]
    assert max(loads) - min(loads) <= 20  # one short image: 4 + 16
