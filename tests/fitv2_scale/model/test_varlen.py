"""The branch for CUDA on a CPU: the network in bf16 with attention by torch's varlen operator, whose CPU kernel comes
from tests.support.varlen_on_cpu.

Both branches round some hundred results on the way to a gradient, each by 2**-10 on average. Such errors add up like a
random walk, to 2**-10 * 100**0.5 or 1 %. They are measured from the same network in float64, with the same weights."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model import attention
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.model.packed_batch import Packing
from fitv2_scale.parallel.blocks import prepare_blocks
from tests.support.tiny_networks import build, pack
from tests.support.varlen_on_cpu import Calls, varlen_on_cpu

DEPTH = 2
SIZES = [(5, 8), (1, 1), (3, 3), (8, 8), (2, 6)]  # then 34 tokens of padding, and empty slots
TOKENS, SLOTS, LONGEST = 160, 9, 64


def with_an_empty_slot(packing: Packing, slot: int) -> Packing:
    """The same tokens; an image without any lies before ``slot``."""
    cu = packing.cu_seqlens_I1
    image_T = packing.image_T + (packing.image_T >= slot)
    cu = torch.cat((cu[: slot + 1], cu[slot:]))
    return Packing(cu, image_T, packing.place_T, packing.positions_T3, packing.max_seqlen)


PACKING = with_an_empty_slot(pack(SIZES, TOKENS, SLOTS, LONGEST), 2)


def bf16_network(head_dim: int) -> DiffusionTransformer:
    return build(ModelConfig(depth=DEPTH, hidden=2 * head_dim, heads=2, classes=5)).bfloat16()


def values(network: DiffusionTransformer) -> dict[str, Tensor]:
    """The output and all gradients of one step, whose inputs are the same for all networks."""
    draw = torch.Generator().manual_seed(3)
    x, gradient = (torch.randn(TOKENS, 16, generator=draw).bfloat16() for _ in range(2))
    t, label = torch.rand(SLOTS + 1, generator=draw), torch.arange(SLOTS + 1) % 6
    out = network(x, t, label, PACKING)
    out.backward(gradient.to(out.dtype))
    return {"output": out.detach()} | {name: p.grad for name, p in network.named_parameters()}


def distance(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def assert_as_near(found: dict[str, Tensor], beside: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """``found`` is about as far from ``exact`` as ``beside``, which is rounded as often, and both are near."""
    assert list(found) == list(beside) == list(exact)
    for name, value in exact.items():
        own = distance(beside[name], value)
        assert value.any() and own < 2**-6, name
        assert distance(found[name], value) < 1.5 * own, name


def test_the_pack_has_what_packs_have():
    assert PACKING.lengths == [40, 1, 0, 9, 64, 12, 34, 0, 0, 0]
    assert PACKING.image_T.bincount(minlength=SLOTS + 1).tolist() == PACKING.lengths


@pytest.mark.parametrize("head_dim", [64, 72, 96])
def test_the_network_with_varlen_is_that_without(head_dim):
    """All but attention is rounded alike, so the two are nearer to each other than to float64."""
    exact, cpu = values(bf16_network(head_dim).double()), values(bf16_network(head_dim))
    with varlen_on_cpu() as calls:
        varlen = values(bf16_network(head_dim))
    assert calls == Calls(DEPTH, DEPTH)
    assert_as_near(varlen, cpu, exact)
    for name in exact:
        assert distance(varlen[name], cpu[name]) < distance(cpu[name], exact[name]), name
    assert any(not torch.equal(varlen[name], cpu[name]) for name in exact)  # two kernels, not one


@pytest.mark.parametrize("checkpointing,computed", [("selective", 1), ("full", 2)])
def test_checkpointing_keeps_varlens_result_or_computes_it_again(checkpointing, computed):
    with varlen_on_cpu() as calls:
        expected = values(bf16_network(72))
        network = bf16_network(72)
        prepare_blocks(network, checkpointing, compile_blocks=False)
        found = values(network)
    assert calls == Calls(DEPTH + computed * DEPTH, 2 * DEPTH)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("checkpointing,computed", [("none", 1), ("selective", 1), ("full", 2)])
def test_a_compiled_block_with_varlen_is_one_graph(checkpointing, computed):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    exact, cpu, network = values(bf16_network(72).double()), values(bf16_network(72)), bf16_network(72)
    with varlen_on_cpu() as calls:
        prepare_blocks(network, checkpointing, compile_blocks=True)
        found = values(network)
    assert calls == Calls(computed * DEPTH, DEPTH)
    assert counters["stats"]["unique_graphs"] == counters["frames"]["total"] == 1 and not counters["graph_break"]
    assert_as_near(found, cpu, exact)


def ask(dim: int = 8, dtype=torch.bfloat16, cu_dtype=torch.int32, longest: int = 4, step: int = 1) -> Tensor:
    q, k, v = (torch.randn(6, 2, step * dim).to(dtype)[..., ::step] for _ in range(3))
    cu = torch.tensor([0, 4, 6], dtype=cu_dtype)
    return varlen_attn(q, k, v, cu, cu, longest, longest)


@pytest.mark.parametrize(
    "wrong", [{"dim": 12}, {"dtype": torch.float32}, {"cu_dtype": torch.int64}, {"longest": 3}, {"step": 2}]
)
def test_what_flash_attention_refuses_is_refused(wrong):
    with varlen_on_cpu():
        assert ask().isfinite().all()
        with pytest.raises(AssertionError):
            ask(**wrong)


def test_the_kernel_is_gone_afterwards():
    with varlen_on_cpu():
        ask()
        assert attention.has_varlen(torch.zeros(1, dtype=torch.bfloat16))
    assert not attention.has_varlen(torch.zeros(1, dtype=torch.bfloat16))
    with pytest.raises((NotImplementedError, RuntimeError), match="CPU|CUDA"):
        ask()
