"""A run is a function of (config, seed, dataset): the number of processes changes nothing but the order of sums."""

import pytest

from fitv2_scale.train.loop import train
from tests.support.ranks import run_ranks
from tests.support.run_history import losses, trained

STEPS = 50


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_run_on_any_number_of_ranks(tiny, size):
    one, many = tiny("one", train__steps=STEPS), tiny("many", train__steps=STEPS)
    assert run_ranks(1, train, one) == [0]
    assert run_ranks(size, train, many) == [0] * size
    assert trained(one.run) == trained(many.run)  # ids, bits of t, noise integers
    expected, found = losses(one.run), losses(many.run)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    for step in expected:
        assert found[step] == pytest.approx(expected[step], rel=1e-6), step


def test_hsdp_is_the_same_run(tiny):
    """Two replicas of two shards each: gradients are reduced over both axes."""
    one, hsdp = tiny("one", train__steps=20), tiny("hsdp", train__steps=20, layout__replicate=2)
    assert run_ranks(1, train, one) == [0]
    assert run_ranks(4, train, hsdp) == [0] * 4
    assert trained(one.run) == trained(hsdp.run)
    assert losses(hsdp.run) == pytest.approx(losses(one.run), rel=1e-6)


def test_packing_does_not_matter(tiny):
    """One, two and five packs a step: the gradient is accumulated and reduced once."""
    whole = tiny("whole", train__steps=20)
    assert run_ranks(2, train, whole) == [0, 0]
    for tokens in (64, 128):
        packed = tiny(f"packed{tokens}", train__steps=20, layout__max_tokens=tokens)
        assert run_ranks(2, train, packed) == [0, 0]
        assert losses(packed.run) == pytest.approx(losses(whole.run), rel=1e-6)


@pytest.mark.parametrize("model", [{"qk_norm": "l2_scale"}, {"qk_norm": "none"}, {"adaln": "full"}])
def test_the_cookbook_is_the_same_run(tiny, model):
    changes = {f"model__{key}": value for key, value in model.items()}
    changes |= {"flow__t_sampler": "uniform", "data__views": "crop"}
    one, two = tiny("one", train__steps=15, **changes), tiny("two", train__steps=15, **changes)
    assert run_ranks(1, train, one) == [0]
    assert run_ranks(2, train, two) == [0, 0]
    assert losses(two.run) == pytest.approx(losses(one.run), rel=1e-6)


def test_bf16_stays_near_fp32(tiny):
    """bf16 keeps 8 bits: a relative error of 2**-9 an operation, averaging out over tokens and images."""
    full, half = tiny("full", train__steps=20), tiny("half", train__steps=20, layout__precision="bf16")
    assert run_ranks(2, train, full) == run_ranks(2, train, half) == [0, 0]
    assert losses(half.run) == pytest.approx(losses(full.run), rel=1e-2)
    assert losses(half.run) != losses(full.run)


def test_compiled_blocks_are_the_same_run(tiny):
    plain = tiny("plain", model__depth=1, train__steps=5)
    compiled = tiny("compiled", model__depth=1, train__steps=5, layout__compile=True)
    assert run_ranks(1, train, plain) == run_ranks(1, train, compiled) == [0]
    assert losses(compiled.run) == pytest.approx(losses(plain.run), rel=1e-5)
