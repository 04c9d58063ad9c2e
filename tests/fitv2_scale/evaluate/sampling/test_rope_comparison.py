"""The table of RoPE variants, from numbers written down."""

import math

import pytest
import torch

from data_sharding.errors import UserError
from fitv2_scale.config.model import ModelConfig, RopeConfig
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.evaluate.sampling.rope_comparison import RopeVariant, to_text, variants


def test_the_table():
    slow = torch.tensor([[1.0, 2 * math.pi / 500], [1.0, 2 * math.pi / 40.5]])  # waves of 500 rows and 40.5 columns
    plain = RopeVariant(RopeConfig(mode="none"), False, slow, 1.0, nfe=25.0)
    chosen = RopeVariant(RopeConfig(mode="vision_ntk", attention_scale="paper"), True, slow, 1.125, nfe=24.5)
    head, first, second, foot = to_text([plain, chosen]).splitlines()
    assert head.split() == ["RoPE", "longest", "wave,", "tokens", "q·k", "times", "NFE"]
    assert first.split() == ["none", "500.0", "x", "40.5", "1.0000", "25.0"]
    assert second.split() == ["*", "vision_ntk", "+", "paper", "500.0", "x", "40.5", "1.1250", "24.5"]
    assert foot == "* the default of `fitv2 sample` at this size"


def test_a_network_without_rope_is_refused():
    model = ModelConfig(depth=1, hidden=32, heads=2, position="sincos")
    with pytest.raises(UserError, match="has model.position=sincos: leave it out; sampling.sincos=ei and pi are"):
        variants(model, SamplingConfig(), "160x160")
    with pytest.raises(UserError, match="has model.position=none: leave it out$"):
        variants(model.model_copy(update={"position": "none"}), SamplingConfig(), "160x160")
