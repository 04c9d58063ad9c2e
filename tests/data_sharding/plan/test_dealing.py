"""The dealing of a step is what it always was, to the image: ties too, since a run that continues relies on it."""

import hashlib
import sys

import numpy as np
import pytest

from data_sharding.plan import greedy_lpt, local_search
from data_sharding.plan.balance import Cost, assign_packs
from data_sharding.plan.pack_layout import PackShape
from data_sharding.plan.pack_shapes import choose_shapes, shapes_for_plan
from data_sharding.plan.partition import partition
from tests.oracle import dealing
from tests.support.plans import COST, manifest, plan_of

INPUTS = 375  # for each way of dealing; one takes the oracle some milliseconds


def lengths(rng: np.random.Generator, images: int) -> np.ndarray:
    """Lengths of several kinds: spread evenly, at a few values, heavy-tailed, all equal, powers."""
    draws = (
        lambda: rng.integers(1, 65, images),
        lambda: rng.choice([256, 256, 256, 234, 247, 100, 50, 1024], images),
        lambda: (rng.pareto(1.0, images) * 20 + 1).clip(1, 100_000),
        lambda: np.full(images, rng.integers(1, 300)),
        lambda: rng.integers(1, 4, images) ** rng.integers(1, 9),
    )
    return draws[rng.integers(len(draws))]().astype(np.int64)


@pytest.fixture(params=[(0, 1, 300), (4, 256, 1 << 21), (1000, 2, 300), (0, 256, 1 << 21)])
def few(request, monkeypatch) -> int:
    """Rows take their steps together, or one by one, or first together; images go to groups in rounds, or by a heap;
    the search may end before no step helps."""
    few, worth_rounds, work = request.param
    monkeypatch.setattr(local_search, "_FEW", few)
    monkeypatch.setattr(greedy_lpt, "_WORTH_ROUNDS", worth_rounds)
    monkeypatch.setattr(local_search, "_WORK", work)
    monkeypatch.setattr(dealing, "WORK", work)
    return few


def test_a_partition_is_that_of_the_oracle(few):
    for seed in range(INPUTS):
        rng = np.random.default_rng((few, seed))
        cost = lengths(rng, int(rng.integers(1, 60)))
        groups = int(rng.integers(1, len(cost) + 3))
        expected = dealing.partition(cost.tolist(), groups)
        found = partition(cost, groups)
        assert [[i for i, g in enumerate(expected) if g == k] for k in range(groups)] == [f.tolist() for f in found]


def test_a_step_is_dealt_as_by_the_oracle(few):
    for seed in range(INPUTS):
        rng = np.random.default_rng((few, seed, 1))
        tokens = lengths(rng, int(rng.integers(1, 110)))
        nodes = [int(rng.integers(1, 5))] * int(rng.integers(1, 9)) if seed % 2 else rng.integers(1, 7, 5).tolist()
        longest, cost = int(tokens.max()), Cost(int(rng.choice([1, 960, 13824])), seed % 3)
        most = longest * int(rng.integers(1, 9))
        shapes = [PackShape(max(longest, most // 2), int(rng.integers(2, 60)), longest), PackShape(most, 130, longest)]
        plain = [(shape.tokens, shape.images, shape.max_seqlen) for shape in shapes]
        index, packs = dealing.packs_of(tokens.tolist(), cost.of(tokens).tolist(), nodes, plain)
        found = assign_packs(tokens, cost, tuple(nodes), shapes)
        assert found.shape == shapes[index]
        assert [[pack.tolist() for pack in rank] for rank in found.packs] == packs
        assert [pack.tolist() for pack in found.packs_of(len(packs) - 1)] == packs[-1]
        work = cost.of(tokens)
        assert found.loads(work).tolist() == [sum(int(work[i]) for pack in rank for i in pack) for rank in packs]


def spread(images: int, most: int) -> np.ndarray:
    """Lengths that need no generator, so that digests of them stay: 1 .. most, and some of twice that."""
    x = np.arange(images, dtype=np.int64) * 2654435761 % 4294967296
    return (x % most + 1) * (1 + x // 65536 % 2)


@pytest.mark.parametrize(
    "most,images,nodes,digest",
    [
        (256, 8192, (8,) * 128, "c1bacddeb3a28d2c"),
        (256, 8192, (1024,), "d016b98dbe8cfa88"),
        (40, 4096, (8,) * 100 + (3,), "c6bf49ad498582e4"),
        (1000, 512, (8,) * 8, "8ecc365ab6cd6c0d"),
        (999, 6000, (300,), "935ac05e0b944dc3"),
    ],
)
def test_golden_digests_freeze_the_dealing_of_large_steps(most, images, nodes, digest):
    """Of the version that searched one node after the other; if one fails, a run that continues is dealt otherwise."""
    tokens = spread(images, most)
    shapes = [PackShape(packs * int(tokens.max()), 2000, int(tokens.max())) for packs in (4, 9)]
    found = hashlib.sha256()
    for rank in assign_packs(tokens, Cost(13824, 1), nodes, shapes).packs:
        for pack in rank:
            found.update(pack.astype("<i8").tobytes() + b"|")
    assert found.hexdigest()[:16] == digest


@pytest.mark.parametrize(
    "ranks,images,most,expected",
    [
        (64, 512, 16384, [(784, 15), (800, 15), (824, 15)]),
        (8, 512, 4096, [(3096, 39), (3112, 39), (3160, 39)]),
    ],
)
def test_shapes_are_as_written_down(ranks, images, most, expected):
    """By the version before, for steps of 256 tokens at most; several packs a rank in the second case."""
    steps = [spread(images * (k + 1), 128)[images * k :] for k in range(12)]
    shapes = choose_shapes(steps, Cost(13824, 1), (8,) * (ranks // 8), most, 256)
    assert [(shape.tokens, shape.images) for shape in shapes] == expected


def test_shapes_of_a_plan_are_as_written_down():
    """By the version before: of four windows, whose steps and mean lengths differ."""
    for frames, seed, slots in ((900, 3, (8, 10, 10)), (900, 4, (10, 10, 10)), (300, 3, (8, 8, 8))):
        plan = plan_of(manifest(60_000, frames, seed=seed, max_tokens=100), 0, 32)
        (shapes,) = shapes_for_plan(plan, COST, (4, 4), 16384).values()
        assert [(shape.tokens, shape.images) for shape in shapes] == list(zip((256, 264, 280), slots, strict=True))


def test_a_pack_may_be_full():
    """One image of 64 tokens each, in four packs of 64; a slot more than needed, for steps that were not examined."""
    shapes = choose_shapes([np.full(4, 64)] * 2, COST, (4,), 4096, 64)
    assert [(shape.tokens, shape.images) for shape in shapes] == [(64, 2), (72, 3)]


def calls(ranks: int, nodes: tuple[int, ...]) -> int:
    """Calls, of Python's functions and of NumPy's, that dealing 8 images a rank takes."""
    tokens, found = spread(8 * ranks, 256), 0

    def count(frame, event, argument):
        nonlocal found
        found += event in ("call", "c_call")

    shapes = [PackShape(16384, 400, 512)]
    assign_packs(tokens, Cost(13824, 1), nodes, shapes)
    sys.setprofile(count)
    try:
        assign_packs(tokens, Cost(13824, 1), nodes, shapes)
    finally:
        sys.setprofile(None)
    return found


def test_calls_grow_less_than_the_ranks():
    """With nodes of 8 ranks hardly at all: nodes take their steps together. With one node, at most as the images."""
    small, large = calls(64, (8,) * 8), calls(1024, (8,) * 128)
    assert large < 3 * small
    assert calls(1024, (1024,)) < 16 * calls(64, (64,))
