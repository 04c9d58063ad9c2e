"""Counter-based random numbers: the right integers on both backends, and statistics as of chance."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_sharding import rng
from data_sharding.rng import Purpose
from fitv2_scale.model import rng as torch_rng

# Random123's published known answers for philox4x32-10: (counter, key, result).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# The layout of key and counter, frozen: draws 0..3 of (seed, NOISE, epoch 7, id 2**40 + 5), block 9.
GOLDEN_SEED = 0x0123456789ABCDEF
GOLDEN = [0xD33FB90A, 0x9ED5F21E, 0x9607C863, 0xC16A65CB]

# Frozen: two purposes of one number would share their draws, and runs would not continue as they began.
NUMBERS = {
    "NOISE": 1, "TIMESTEP": 2, "LABEL_DROP": 3, "FLIP": 4, "VIEW": 5, "FRAME_ORDER": 6, "SAMPLE_ORDER": 7,
    "STEP_ORDER": 8, "INIT": 9, "SAMPLER_NOISE": 10, "HOLDOUT": 11, "DATA_ID": 12, "POSTERIOR": 13, "SUBSTITUTE": 14,
    "PRESET": 15, "VALIDATION_ORDER": 16, "VALIDATION_NOISE": 17, "SAMPLER_LABEL": 18,
}  # fmt: skip


def test_purposes_have_the_numbers_that_they_have_always_had():
    numbers = {name: int(purpose) for name, purpose in Purpose.__members__.items()}
    assert numbers.items() >= NUMBERS.items() and len(set(numbers.values())) == len(numbers)


@pytest.mark.parametrize("counter,key,expected", KNOWN)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert tuple(int(w) for w in rng.philox(key, counter)) == expected


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_golden_vector_on_both_backends(device):
    numpy = rng.words(GOLDEN_SEED, Purpose.NOISE, 7, 2**40 + 5, 36 + np.arange(4))
    assert numpy.tolist() == GOLDEN
    block = torch.tensor([9], device=device)
    assert torch_rng.words(GOLDEN_SEED, Purpose.NOISE, 7, 2**40 + 5, block).cpu()[0].tolist() == GOLDEN


def test_a_draw_of_64_bits_is_the_first_two_of_32():
    key, counter = (0x89ABCDEF, 0x01234567), (0, 5, 1 << 8, (int(Purpose.NOISE) << 24) | 7)
    low, high, *_ = (int(word) for word in rng.philox(key, counter))
    assert int(rng.words64(GOLDEN_SEED, Purpose.NOISE, 7, 2**40 + 5)) == low | high << 32 == 3657279992319345358


@given(
    st.integers(0, 2**64 - 1),
    st.sampled_from(Purpose),
    st.integers(0, rng.MAX_EPOCH - 1),
    st.integers(0, rng.MAX_ID - 1),
    st.integers(0, 2**20),
)
def test_backends_agree(seed, purpose, epoch, sample_id, block):
    numpy = rng.words(seed, purpose, epoch, sample_id, 4 * block + np.arange(4))
    assert torch_rng.words(seed, purpose, epoch, sample_id, torch.tensor(block)).tolist() == numpy.tolist()


def test_each_part_of_the_key_matters():
    """Seed 1 epoch 2 is not seed 2 epoch 1, nor does any other swap or neighbour give the same stream."""
    index = np.arange(64)
    keys = [(1, Purpose.NOISE, 2, 3), (2, Purpose.NOISE, 1, 3), (1, Purpose.NOISE, 3, 2), (1, Purpose.TIMESTEP, 2, 3)]
    keys += [(1 + 2**32, Purpose.NOISE, 2, 3), (1, Purpose.NOISE, 2, 3 + 2**32)]
    streams = {tuple(rng.words(*key, index).tolist()) for key in keys}
    assert len(streams) == len(keys)


@pytest.mark.parametrize("over", ["id", "epoch", "index"])
def test_uniform_along_every_axis(over):
    """Chi-square of 2**18 draws in 256 bins, and the correlation of neighbours, for a fixed key: p far from 0."""
    from scipy import stats

    n = 1 << 18
    arguments = {"epoch": 3, "ids": 12345, "index": 0} | {"ids" if over == "id" else over: np.arange(n)}
    u = rng.uniform(0, Purpose.TIMESTEP, **arguments)
    counts = np.bincount((u * 256).astype(int), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-4
    assert stats.kstest(u, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / np.sqrt(n)


def test_normals_are_normal_and_pairs_independent():
    from scipy import stats

    words = torch_rng.words(0, Purpose.NOISE, 0, 7, torch.arange(1 << 16))
    z = torch_rng.normal(words).flatten().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(z[0::2], z[1::2])[0, 1]) < 5 / np.sqrt(len(z) / 2)
    assert abs(np.corrcoef(z[0::2] ** 2, z[1::2] ** 2)[0, 1]) < 5 / np.sqrt(len(z) / 2)
    assert np.isfinite(z).all()


def test_extreme_words_give_finite_normals():
    extreme = torch.tensor([0, 0, 2**32 - 1, 2**32 - 1])
    assert torch.isfinite(torch_rng.normal(extreme)).all()


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(ValueError, match="seed must lie in"):
        rng.words(2**64, Purpose.NOISE, 0, 0)


@given(st.integers(0, 2**32), st.integers(0, 100), st.integers(0, 300))
def test_keyed_order_is_a_permutation(seed, epoch, n):
    order = rng.keyed_order(seed, Purpose.FRAME_ORDER, epoch, np.arange(n))
    assert sorted(order.tolist()) == list(range(n))


def test_a_long_order_is_that_of_all_draws_at_once():
    ids = np.arange(200_001) + (1 << 40)
    draws = rng.words64(3, Purpose.FRAME_ORDER, 2, ids)
    assert np.array_equal(rng.keyed_order(3, Purpose.FRAME_ORDER, 2, ids), np.argsort(draws, kind="stable"))
