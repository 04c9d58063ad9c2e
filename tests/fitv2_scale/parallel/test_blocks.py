"""Checkpointing and compiling blocks: the same gradients, the same names, and less memory where memory is the point."""

import numpy as np
import pytest
import torch

from fitv2_scale.config.layout import Layout
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.fitv2 import FiTv2
from fitv2_scale.parallel.blocks import prepare_blocks
from fitv2_scale.parallel.mesh import make_groups
from fitv2_scale.parallel.tensor import tensor_linear
from fitv2_scale.parallel.world import join
from tests.support.memory import HeldResults
from tests.support.ranks import run_ranks
from tests.support.tiny_networks import SWITCHES, TINY, build, pack

TOKENS = 48
PACKING = pack([(3, 4), (5, 2), (4, 4)], TOKENS, 5, 16)


def run(network: FiTv2) -> torch.Tensor:
    torch.manual_seed(0)
    return network(torch.randn(TOKENS, 16), torch.rand(5), torch.tensor([1, 0, 3, 0, 0]), PACKING)


def gradients(config: ModelConfig, checkpointing: str, compile_blocks: bool = False) -> dict[str, torch.Tensor]:
    network = build(config)
    prepare_blocks(network, checkpointing, compile_blocks)
    run(network).square().sum().backward()
    return {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_gradients_are_those_without_checkpointing_bit_for_bit(checkpointing, switch):
    config = TINY.model_copy(update=switch)
    expected, found = gradients(config, "none"), gradients(config, checkpointing)
    assert list(found) == list(expected)
    for name in expected:
        assert expected[name].any() and torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_blocks_have_the_same_gradients_and_are_compiled_once(checkpointing):
    """Compiled kernels add in another order: equal but for float32's rounding, 2**-24, summed over 48 tokens."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected = gradients(TINY, "none")
    found = gradients(TINY, checkpointing, compile_blocks=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # two blocks, one shape, one graph
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)


def gradients_on_a_tensor_rank(checkpointing: str, compile_blocks: bool = False) -> dict[str, np.ndarray]:
    with join() as world:
        group = make_groups(Layout.of(world.size, 1, world.size), "cpu").tensor
        network = FiTv2(TINY, tensor_linear(group))
        with torch.no_grad():
            for i, p in enumerate(network.parameters()):
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(2 * i + world.rank))
        prepare_blocks(network, checkpointing, compile_blocks)
        run(network).square().sum().backward()
        return {name: p.grad.numpy() for name, p in network.named_parameters()}


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_sums_over_a_tensor_group_are_neither_lost_nor_made_twice(checkpointing):
    """The sum is made in place, in the memory of a product that ``selective`` keeps."""
    expected, found = (run_ranks(2, gradients_on_a_tensor_rank, mode) for mode in ("none", checkpointing))
    for rank in range(2):
        for name in expected[rank]:
            np.testing.assert_array_equal(found[rank][name], expected[rank][name], err_msg=name)


def test_public_names_stay():
    network = build(TINY)
    names = [name for name, _ in network.named_parameters()]
    prepare_blocks(network, "selective", compile_blocks=True)
    assert [name for name, _ in network.named_parameters()] == names == list(network.state_dict())


def held_after_forward(config: ModelConfig, checkpointing: str) -> int:
    """Bytes that the forward pass leaves behind for the backward one, weights not counted."""
    network = build(config)
    prepare_blocks(network, checkpointing, compile_blocks=False)
    with HeldResults(list(network.parameters())) as results:
        loss = run(network).square().sum()
    held = results.held()
    del loss
    return held


def test_what_is_held_for_the_backward_pass():
    """For each further block of FiTv2's proportions: everything; the products; the block's input alone.

    The products of a block: qkv 3 D, attention's result D, proj D, gate and value 2 M, fc2 D a token, and the head's
    R + 6 D an image. The CPU's attention works on padded places, and keeps a log-sum-exp a head.
    """
    wide = {"hidden": 96, "heads": 2, "classes": 5}
    one, three = (ModelConfig(depth=depth, **wide) for depth in (1, 3))
    block = {
        mode: (held_after_forward(three, mode) - held_after_forward(one, mode)) / 2
        for mode in ("none", "selective", "full")
    }
    d, m, r, images, padded = 96, 256, 24, 5, 5 * 16
    assert block["full"] == 4 * TOKENS * d
    linears = TOKENS * (3 * d + d + 2 * m + d) + images * (r + 6 * d)
    attention = padded * (d + 2)
    assert block["selective"] == block["full"] + 4 * (linears + attention)
    assert block["none"] > 2 * block["selective"]
