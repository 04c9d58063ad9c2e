"""How the estimated peak of a GPU depends on what it is made of."""

import math
from dataclasses import replace

import pytest

from fitv2_scale.config.layout import Layout
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.counts import logical_shapes
from fitv2_scale.parallel.memory_estimate import Compute, cuda_peak, saved_bytes, state_bytes

MODEL = ModelConfig(depth=3, hidden=32, heads=2, classes=5)
COMPUTE = Compute("none", compiled=False, precision="bf16", packs=1, tokens=1000)
LAYOUT = Layout(1, 2)


def peak(**changes) -> int:
    state = state_bytes("fsdp", MODEL, LAYOUT, ["*"], "bf16", 0)
    return cuda_peak(MODEL, LAYOUT, state, replace(COMPUTE, **changes))


def test_the_peak_holds_the_state_and_what_a_step_needs():
    state = state_bytes("fsdp", MODEL, LAYOUT, ["*"], "bf16", 0)
    assert peak() > state.held + state.gradients
    assert peak(tokens=2000) - peak() == peak(tokens=3000) - peak(tokens=2000) > 0  # in proportion to the tokens
    assert peak(packs=2) - peak() == state.accumulated > 0
    # The less is saved for the backward pass, the more is recomputed, of one block at a time.
    assert peak(checkpointing="full") < peak(checkpointing="selective") < peak()
    assert peak(precision="fp32") > 1.5 * peak()


def test_with_checkpointing_one_block_at_a_time_is_there_again():
    whole, none = (saved_bytes(MODEL, LAYOUT, replace(COMPUTE, checkpointing=kind)) for kind in ("none", "full"))
    assert 3 * (peak() - peak(checkpointing="full")) == 2 * (whole - none) > 0  # of three blocks, two are not


@pytest.mark.parametrize("tensor", [1, 2])
def test_what_is_saved_for_the_backward_pass(tensor):
    """Per token and block, by hand: D = 32, M = the MLP's width, two bytes a number, a float32 a head."""
    layout, m = Layout(1, 1, tensor), {1: 85, 2: 43}[tensor]  # 4 D 2 / 3, and its larger half
    kinds = ("full", "selective", "none")
    of = {kind: saved_bytes(MODEL, layout, replace(COMPUTE, checkpointing=kind)) for kind in kinds}
    head = 4 * 2 // tensor
    a_block = {"full": 2 * 32, "selective": 2 * (3 * 32 + 4 * 32 // tensor + 2 * m) + head}
    a_block["none"] = a_block["selective"] + 2 * (2 * 32 + 2 * 32 // tensor + m + 11 * 32 + m)
    assert of == {kind: 3 * 1000 * number for kind, number in a_block.items()}


def test_an_mlp_without_a_gate_and_q_and_k_as_they_come_save_less():
    """Of an MLP of 4 D = 128 units one product and its GELU; q and k are parts of what the product gave."""
    model = MODEL.model_copy(update={"mlp": "gelu", "position": "sincos", "qk_norm": "none"})
    kinds = ("full", "selective", "none")
    of = {kind: saved_bytes(model, Layout(1, 1), replace(COMPUTE, checkpointing=kind)) for kind in kinds}
    a_block = {"full": 2 * 32, "selective": 2 * (3 * 32 + 4 * 32 + 128) + 8}
    a_block["none"] = a_block["selective"] + 2 * (2 * 32 + 128 + 11 * 32)
    assert of == {kind: 3 * 1000 * number for kind, number in a_block.items()}


@pytest.mark.parametrize("precision,bytes_", [("bf16", 2), ("fp32", 4)])
def test_weights_that_are_prefetched(precision, bytes_):
    """Of three blocks there are two to gather ahead, at most."""
    one, two, four = (peak(precision=precision, prefetch_blocks=depth) for depth in (1, 2, 4))
    of_block = [math.prod(shape) for name, shape in logical_shapes(MODEL).items() if name.startswith("blocks.0.")]
    assert two - one == bytes_ * sum(of_block) and four == two


@pytest.mark.parametrize("precision,bytes_", [("bf16", 2), ("fp32", 4)])
def test_weights_that_stay_gathered(precision, bytes_):
    """All weights of the three blocks are there, where three times those of one were: the shards are equal here but for
    the MLP's 85 rows and the 6 of the label table, so that two ranks hold 86 of the former."""
    padding = 3 * 2 * (32 + 1)  # of two tensors a block, a row of 32 and its bias
    more = peak(precision=precision, reshard_after_forward="never") - peak(precision=precision)
    assert more == bytes_ * padding
