"""The kernels that Inductor writes for a block on an H200, counted on a machine without one: a slower mix fails here.

Bytes a token as counted with torch 2.11's CUDA build and Triton; torch 2.13's CPU build gives 0.1 to 0.3 % more. A
kernel's own bytes and the shapes of the products are counted by hand.
"""

from collections import Counter

import pytest

from fitv2_scale.bench.kernels.counts import CompiledBlock, Kernel
from fitv2_scale.bench.kernels.predict import counted
from fitv2_scale.config.load import load_config
from fitv2_scale.planning.forecast.predicted import read_table
from tests.support.repository import ROOT

TOKENS, SLOTS = 16384, 72
D, MLP, RANK = 2304, 6144, 576  # FiTv2-3B/2


def compiled(config: str, *overrides: str) -> CompiledBlock:
    asked = load_config(str(ROOT / "configs" / config), overrides)
    shape = {"tokens": TOKENS, "images": SLOTS, "max_seqlen": 256}
    words = {"what": "block", "gpu": "H200", "config": asked.model_dump(mode="json"), "shape": shape}
    return CompiledBlock.from_json(counted(words))


@pytest.fixture(scope="module")
def block() -> CompiledBlock:
    return compiled("fitv2_3b2.yaml")


def bytes_a_token(kernels: tuple[Kernel, ...]) -> float:
    return sum(kernel.bytes for kernel in kernels if kernel.kind == "triton") / TOKENS


def count(kernels: tuple[Kernel, ...], kind: str) -> int:
    return sum(kernel.kind == kind for kernel in kernels)


def test_one_graph_without_a_break(block):
    assert (block.graphs, block.breaks) == (1, 0)


def test_elementwise_kernels_and_their_bytes(block):
    assert (count(block.forward, "triton"), count(block.backward, "triton")) == (7, 20)
    assert bytes_a_token(block.forward) == pytest.approx(103_100, rel=0.003)
    assert bytes_a_token(block.backward) == pytest.approx(230_900, rel=0.003)
    assert (count(block.forward, "attention"), count(block.backward, "attention")) == (1, 1)
    assert count((*block.forward, *block.backward), "other") == 0


def test_the_table_of_predictions_is_of_this_network(block):
    """`fitv2 bench kernels CONFIG data.url=preset:imagenet256 --table FILE` makes its row again. That is for 16,016
    tokens in 75 slots."""
    row = next(row for row in read_table() if row["model"]["hidden"] == D)
    passes = (block.forward, block.backward)
    assert [count(kernels, "triton") for kernels in passes] == row["triton_kernels"]
    assert [bytes_a_token(kernels) for kernels in passes] == pytest.approx(row["triton_bytes_a_token"], rel=0.002)


def test_the_bytes_of_swiglu(block):
    """SiLU(gate) x value reads two bf16 rows and writes one."""
    (kernel,) = [k for k in block.forward if k.name.startswith("triton_poi_fused_mul_silu")]
    assert kernel.bytes == 3 * 2 * MLP * TOKENS


def test_products_by_shape(block):
    """(rows, columns, summed): of a linear from k to n channels (T, n, k), then (T, k, n) for its input's gradient and
    one for its weight's, which may be made transposed."""
    linears = [(D, 3 * D), (D, D), (D, MLP), (D, MLP), (MLP, D)]
    adaln = [(D, RANK), (RANK, 6 * D)]
    forward = Counter([(TOKENS, n, k) for k, n in linears] + [(SLOTS, n, k) for k, n in adaln])
    assert Counter(k.product for k in block.forward if k.product) == forward
    of_inputs = [(TOKENS, k, n) for k, n in linears] + [(SLOTS, k, n) for k, n in adaln]
    of_weights = [(*sorted((k, n)), TOKENS) for k, n in linears] + [(*sorted((k, n)), SLOTS) for k, n in adaln]
    by_segment = [(SLOTS, 6 * D, TOKENS)]  # the modulation's gradient, summed over each image's tokens
    found = [k.product for k in block.backward if k.product]
    rows_of = (TOKENS, SLOTS)
    upright = [p if p[0] in rows_of else (*sorted(p[:2]), p[2]) for p in found]
    assert Counter(upright) == Counter(of_inputs + of_weights + by_segment)


def test_flops_of_the_products(block):
    """Two a multiply-add of each linear, three times over."""
    flops = sum(2 * r * c * s for r, c, s in (k.product for k in (*block.forward, *block.backward) if k.product))
    linears = 6 * TOKENS * (4 * D * D + 3 * D * MLP) + 6 * SLOTS * (D * RANK + 6 * D * RANK)
    assert flops == linears + 2 * SLOTS * 6 * D * TOKENS


def test_a_key_shows_its_effect(block):
    """Blocks that are computed again in the backward pass: all seven products, attention, and what lies between."""
    full = compiled("fitv2_3b2.yaml", "layout.checkpointing=full")
    assert count(full.backward, "product") == count(block.backward, "product") + 7
    assert count(full.backward, "attention") == 2
    assert bytes_a_token(full.backward) > 1.2 * bytes_a_token(block.backward)


@pytest.mark.long
def test_a_head_that_is_no_power_of_two():
    """XL/2, whose heads have 72 channels: half the width of 3B/2, and the table of angles with the same 4 bytes."""
    xl = compiled("fitv2_xl2.yaml")
    assert (count(xl.forward, "triton"), count(xl.backward, "triton")) == (7, 20)
    assert bytes_a_token((*xl.forward, *xl.backward)) == pytest.approx((103_100 + 230_900) / 2, rel=0.02)
