"""Checkpointing and compiling blocks: the same gradients, the same names, and less memory where memory is the point."""

from functools import partial

import numpy as np
import pytest
import torch

from fitv2_scale.config.layout import Layout
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.parallel import blocks
from fitv2_scale.parallel.blocks import prepare_blocks
from fitv2_scale.parallel.mesh import make_groups
from fitv2_scale.parallel.tensor import tensor_linear
from fitv2_scale.parallel.world import join
from tests.support.memory import HeldResults
from tests.support.ranks import run_ranks
from tests.support.tiny_networks import SWITCHES, TINY, build, pack

TOKENS = 48
PACKING = pack([(3, 4), (5, 2), (4, 4)], TOKENS, 5, 16)


def run(network: DiffusionTransformer) -> torch.Tensor:
    torch.manual_seed(0)
    return network(
        torch.randn(TOKENS, network.config.token_channels), torch.rand(5), torch.tensor([1, 0, 3, 0, 0]), PACKING
    )


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


@pytest.fixture
def counted(monkeypatch):
    """torch's counters of what it compiles, from zero and with its own limit; only traced, no kernels are made."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=8):  # torch's own, whatever ran before
        yield torch._dynamo.utils.counters


def step_of_shape(network: DiffusionTransformer, extra: int) -> None:
    """Forward and backward on a pack never seen before, as each pack of a run is: of 48 + 8 ``extra`` tokens."""
    tokens, images = 48 + 8 * extra, 5 + extra
    packing = pack([(3, 4), (5, 2), (4, 4)], tokens, images, 16)
    label = torch.zeros(images, dtype=torch.int64)
    out = network(torch.randn(tokens, 16), torch.rand(images), label, packing)
    if out.requires_grad:
        out.square().sum().backward()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_block_is_one_graph_a_shape_where_images_are_padded(checkpointing, counted):
    network = build(TINY)
    prepare_blocks(network, checkpointing, compile_blocks=True)
    for graphs, extra in enumerate((0, 1, 2), start=1):
        for _ in range(2):  # a second pack of the shape compiles nothing
            step_of_shape(network, extra)
            assert counted["stats"]["unique_graphs"] == counted["frames"]["ok"] == counted["frames"]["total"] == graphs
    assert not counted["graph_break"]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_more_shapes_than_torch_expects_are_all_compiled(checkpointing, counted):
    """Twelve, each trained on and evaluated, while torch's own limit is eight forms."""
    network = build(TINY)
    prepare_blocks(network, checkpointing, compile_blocks=True)
    for extra in range(12):
        step_of_shape(network, extra)
        with torch.no_grad():
            step_of_shape(network, extra)
    assert counted["stats"]["unique_graphs"] == counted["frames"]["ok"] == counted["frames"]["total"] == 24


@pytest.mark.parametrize("compiled", [True, False])
def test_padding_is_made_only_where_it_is_used(compiled, monkeypatch):
    """It costs a gather of max_seqlen places an image: nothing that a network should pay whose blocks are compiled with
    the varlen kernel, or go from image to image."""
    if compiled:
        monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
        monkeypatch.setattr(blocks, "has_varlen", lambda x: True)
    network = build(TINY)
    prepare_blocks(network, "none", compiled)
    packing = pack([(3, 4), (5, 2), (4, 4)], TOKENS, 5, 16)
    network(torch.randn(TOKENS, 16), torch.rand(5), torch.zeros(5, dtype=torch.int64), packing)
    assert "padded" not in vars(packing)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype,padded", [(torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_block_is_one_graph_a_shape_on_a_gpu(checkpointing, dtype, padded, counted):
    network = build(TINY).to("cuda", dtype)
    prepare_blocks(network, checkpointing, compile_blocks=True)
    for graphs, tokens in enumerate((48, 56), start=1):
        packing = pack([(3, 4), (5, 2), (4, 4)], tokens, 6, 16).to(torch.device("cuda"))
        label = torch.zeros(6, dtype=torch.int64, device="cuda")
        network(torch.randn(tokens, 16, device="cuda"), torch.rand(6, device="cuda"), label, packing).sum().backward()
        assert counted["stats"]["unique_graphs"] == graphs and ("padded" in vars(packing)) == padded
    assert not counted["graph_break"]


def gradients_on_a_tensor_rank(checkpointing: str, compile_blocks: bool = False) -> dict[str, np.ndarray]:
    with join() as world:
        group = make_groups(Layout.of(world.size, 1, world.size), "cpu").tensor
        network = DiffusionTransformer(TINY, tensor_linear(group))
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
    R + 6 D an image. Attention keeps a log-sum-exp a head besides.
    """
    wide = {"hidden": 96, "heads": 2, "classes": 5}
    one, three = (ModelConfig(depth=depth, **wide) for depth in (1, 3))
    block = {
        mode: (held_after_forward(three, mode) - held_after_forward(one, mode)) / 2
        for mode in ("none", "selective", "full")
    }
    d, m, r, images = 96, 256, 24, 5
    assert block["full"] == 4 * TOKENS * d
    linears = TOKENS * (3 * d + d + 2 * m + d) + images * (r + 6 * d)
    attention = TOKENS * (d + 2)
    assert block["selective"] == block["full"] + 4 * (linears + attention)
    assert block["none"] > 2 * block["selective"]
