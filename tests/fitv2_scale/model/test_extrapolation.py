"""RoPE extrapolation against the formulas written out again, one image and one channel at a time, in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sharding.plan.pack_layout import PackShape, lay_out
from fitv2_scale.config.model import ModelConfig, RopeConfig
from fitv2_scale.model.extrapolation import extrapolated_table
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.model.positions import positions_of
from fitv2_scale.model.rope import rope_table
from fitv2_scale.model.to_torch import packing_to_torch

MODES = ["none", "pi", "ntk", "yarn", "vision_ntk", "vision_yarn"]
SCALES = ["none", "paper", "released"]
SIZES = [(16, 16), (20, 20), (10, 20), (14, 28), (30, 10), (48, 16), (3, 70), (1, 1)]


def frequency(mode: str, i: int, length: int, head_dim: int, theta: float, trained: int) -> float:
    """Of channel pair i along an axis that is scaled as for ``length`` tokens."""
    dim, s = head_dim // 2, max(1.0, length / trained)
    plain = 1 / theta ** (2 * i / dim)
    if mode == "pi":
        return plain / s
    if mode.endswith("ntk"):
        return 1 / (theta * s ** (dim / (dim - 2))) ** (2 * i / dim)
    if mode.endswith("yarn"):
        low = math.floor(dim * math.log(trained / (32 * 2 * math.pi)) / (2 * math.log(theta)))
        high = math.ceil(dim * math.log(trained / (1 * 2 * math.pi)) / (2 * math.log(theta)))
        low, high = max(low, 0), min(high, dim - 1)
        interpolated = min(1.0, max(0.0, (i - low) / (high - low if high != low else 0.001)))
        return interpolated * plain / s + (1 - interpolated) * plain
    return plain


def factor(mode: str, scale: str, h: int, w: int, trained: int) -> float:
    """Of q k."""
    s, found = max(1.0, max(h, w) / trained), 1.0
    if mode.endswith("yarn"):
        found = (0.1 * math.log(s) + 1) ** 2
    if scale == "paper":
        found *= max(1.0, math.log(h * w, trained**2))
    if scale == "released" and 2 * h * w > trained**2:
        found *= math.log(2 * h * w) / math.log(trained**2)
    return found


def expected(rope: RopeConfig, h: int, w: int, tokens: list[int], head_dim: int, theta: float) -> tuple:
    own = rope.mode.startswith("vision")
    root = math.sqrt(factor(rope.mode, rope.attention_scale, h, w, rope.train_side))
    angles = np.zeros((len(tokens), head_dim // 2))
    for number, token in enumerate(tokens):
        for axis, (place, length) in enumerate(zip(divmod(token, w), (h, w), strict=True)):
            for i in range(head_dim // 4):
                used = length if own else max(h, w)
                turn = frequency(rope.mode, i, used, head_dim, theta, rope.train_side)
                angles[number, axis * (head_dim // 4) + i] = place * turn
    return root * np.cos(angles), root * np.sin(angles)


def pack(sizes: list[tuple[int, int]], spare: int = 5):
    tokens, longest = sum(h * w for h, w in sizes), max(h * w for h, w in sizes)
    return packing_to_torch(lay_out(sizes, PackShape(tokens + spare, len(sizes) + spare, longest)))


@pytest.mark.parametrize(
    "head_dim, theta, trained", [(72, 10000.0, 16), (96, 10000.0, 16), (40, 100.0, 10), (8, 1e4, 4)]
)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mode", MODES)
def test_formulas(mode, scale, head_dim, theta, trained):
    rope = RopeConfig(mode=mode, attention_scale=scale, train_side=trained)
    cos_TF, sin_TF = extrapolated_table(pack(SIZES), rope, head_dim, theta)
    at = 0
    for h, w in SIZES:
        tokens = [0, h * w // 3, h * w // 2, h * w - 1]
        cos, sin = expected(rope, h, w, tokens, head_dim, theta)
        np.testing.assert_allclose(cos_TF[at : at + h * w][tokens], cos, atol=1e-5)
        np.testing.assert_allclose(sin_TF[at : at + h * w][tokens], sin, atol=1e-5)
        at += h * w


def test_known_values():
    """Figures from the released code and the paper at 320x320: the two attention scales differ, and at 256x256 too."""
    for scale, size, value in (
        ("released", 20, 1.2055),
        ("paper", 20, 1.0805),
        ("released", 16, 1.125),
        ("paper", 16, 1),
    ):
        rope = RopeConfig(attention_scale=scale)
        cos_TF, sin_TF = extrapolated_table(pack([(size, size)]), rope, 96, 1e4)
        np.testing.assert_allclose((cos_TF**2 + sin_TF**2)[: size * size], value, atol=1e-4)
    # By FiTv2-XL's 36 channels an axis and a scale of 2 the base is 10000 * 2^(36/34).
    cos_TF, sin_TF = extrapolated_table(pack([(1, 32)]), RopeConfig(mode="vision_ntk"), 72, 1e4)
    angle = torch.atan2(sin_TF, cos_TF)[1, 18:].double()
    np.testing.assert_allclose(angle, (10000 * 2 ** (36 / 34)) ** (-np.arange(18) / 18), rtol=1e-5)
    assert (torch.atan2(sin_TF, cos_TF)[1, :18] == 0).all()


ropes = st.builds(
    RopeConfig,
    mode=st.sampled_from(MODES),
    attention_scale=st.sampled_from(SCALES),
    train_side=st.sampled_from([4, 10, 16]),
)
sizes = st.tuples(st.integers(1, 24), st.integers(1, 24))


@settings(max_examples=40)
@given(st.lists(st.tuples(sizes, ropes), min_size=1, max_size=6))
def test_each_image_of_a_pack_has_its_own(images):
    packing = pack([size for size, _ in images])
    slots = [rope for _, rope in images] + [RopeConfig()] * 5
    mixed = extrapolated_table(packing, slots, 16, 1e4)
    at = 0
    for (h, w), rope in images:
        alone = extrapolated_table(pack([(h, w)]), rope, 16, 1e4)
        for found, one in zip(mixed, alone, strict=True):
            torch.testing.assert_close(found[at : at + h * w], one[: h * w], rtol=0, atol=0)
        at += h * w


@settings(max_examples=40)
@given(st.sampled_from(MODES), st.sampled_from(["none", "paper"]), st.lists(sizes, min_size=1, max_size=5))
def test_plain_rope_bit_for_bit_within_the_trained_side(mode, scale, images):
    packing = pack(images)
    found = extrapolated_table(packing, RopeConfig(mode=mode, attention_scale=scale, train_side=24), 32, 1e4)
    for a, b in zip(found, rope_table(packing.positions_T2, 32, 1e4), strict=True):
        assert torch.equal(a, b)


def test_the_network_takes_what_its_config_says_and_what_it_is_given():
    rope = RopeConfig(mode="vision_ntk", attention_scale="paper", train_side=4)
    plain = ModelConfig(depth=2, hidden=32, heads=2, classes=5)
    stage = plain.model_copy(update={"rope": rope})
    packing = pack([(3, 4), (8, 6)])
    outputs = []
    for config in (plain, stage):
        network = DiffusionTransformer(config)
        with torch.no_grad():
            torch.manual_seed(0)
            for p in network.parameters():
                p.normal_(std=0.2)
        inputs = torch.randn(65, 16), torch.rand(7), torch.zeros(7, dtype=torch.int64), packing
        outputs.append((network(*inputs), network(*inputs, positions_of(plain, packing, [rope] * 7))))
    (as_trained, as_given), (by_config, _) = outputs
    torch.testing.assert_close(as_given, by_config, rtol=0, atol=0)
    torch.testing.assert_close(as_given[:12], as_trained[:12], rtol=1e-6, atol=1e-6)
    assert (as_given[12:60] - as_trained[12:60]).abs().max() > 1e-4
