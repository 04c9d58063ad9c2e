"""How the estimated peak of a GPU depends on what it is made of."""

from dataclasses import replace

from fitv2_scale.config.layout import Layout
from fitv2_scale.config.model import ModelConfig
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
