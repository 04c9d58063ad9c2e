"""The kernels that Inductor writes for a block on an H200, counted on a machine without one: a slower mix fails here.

Bytes a token as counted with torch 2.11's CUDA build and Triton; torch 2.13's CPU build gives 0.1 to 0.3 % more. A
kernel's own bytes and the shapes of the products are counted by hand.
"""

from collections import Counter

import pytest
import torch
from torch.torch_version import TorchVersion

from fitv2_scale.bench.kernels.counts import FLOAT8, CompiledBlock, Kernel
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


def test_gate_and_value_are_one_product_if_merged():
    """And the gradient of x needs no sum of two."""
    merged = compiled("fitv2_3b2.yaml", "layout.gate_and_value=merged")
    forward, backward = ({k.product for k in kernels} for kernels in (merged.forward, merged.backward))
    assert (merged.graphs, merged.breaks) == (1, 0)
    assert (TOKENS, 2 * MLP, D) in forward and (TOKENS, MLP, D) not in forward
    assert (TOKENS, D, 2 * MLP) in backward and (TOKENS, D, MLP) not in backward


WRITTEN = {"gate_backward": 3 * D, "join_backward": 6 * D, "norm_backward": 4 * D, "swiglu_backward": 5 * MLP}


def test_the_written_kernels(block):
    """Each once, with two bytes for each number that its formula needs and writes, and its sums in float32: in all at
    most 24 kernels. No gradient is written out for each token only to be summed."""
    written = compiled("fitv2_3b2.yaml", "layout.kernels=triton", "layout.gate_and_value=merged")
    assert (written.graphs, written.breaks) == (1, 0)
    kernels = (*written.forward, *written.backward)
    assert count(kernels, "triton") == 22 and count(kernels, "other") == 0
    assert bytes_a_token(kernels) == pytest.approx(280_200, rel=0.003)
    assert (SLOTS, 6 * D, TOKENS) not in {k.product for k in kernels}
    by_name = {k.name.split(".")[1]: k.bytes / TOKENS for k in kernels if k.name.startswith("fitv2_scale.")}
    for name, numbers in WRITTEN.items():
        assert by_name.pop(name) == pytest.approx(2 * numbers, rel=0.03), name
    assert by_name.keys() == {"heads_backward"}
    assert by_name["heads_backward"] == pytest.approx(2 * 9 * D, rel=0.04)  # reads q and k of (q, k, v), all counted


@pytest.mark.parametrize("key", ["layout.checkpointing=full", "layout.checkpointing=selective"])
def test_the_written_kernels_with_blocks_that_are_computed_again(key):
    written = compiled("fitv2_3b2.yaml", "layout.kernels=triton", key)
    assert (written.graphs, written.breaks) == (1, 0)
    assert sum(k.name.startswith("fitv2_scale.") for k in (*written.forward, *written.backward)) == 5


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


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.13", reason="this torch does not compile its products")
def test_products_in_fp8():
    """With ``selective`` those of the forward pass are kept: 5 of it and 5 gradients of inputs, of rows by columns by
    summed; the gradients of weights stay in bf16. Everything that scales and rounds is compiled into other kernels, or
    small: it adds less to the bytes than a copy of each factor and its fp8 form, read and written, would."""
    fp8 = compiled("fitv2_3b2.yaml", "layout.precision=fp8", "layout.pad_to_multiple_of=16", KEPT)
    bf16 = compiled("fitv2_3b2.yaml", KEPT)
    assert (fp8.graphs, fp8.breaks) == (1, 0)
    forward = {(3 * D, D): 1, (D, D): 1, (MLP, D): 2, (D, MLP): 1}
    backward = {(D, 3 * D): 1, (D, D): 1, (D, MLP): 2, (MLP, D): 1}
    assert float8_products(fp8.forward) == {(TOKENS, *shape): n for shape, n in forward.items()}
    assert float8_products(fp8.backward) == {(TOKENS, *shape): n for shape, n in backward.items()}
    weights = Counter(k.product[:2] for k in fp8.backward if k.product and k.product[2] == TOKENS and k.name != FLOAT8)
    assert weights == {(3 * D, D): 1, (D, D): 1, (MLP, D): 2, (D, MLP): 1, (SLOTS, 6 * D): 1}
    assert count((*fp8.forward, *fp8.backward), "other") == 0
    factors, their_weights = 3 * D + MLP + 3 * D + D + 2 * MLP + D, 2 * (3 * D * D + D * D + 3 * D * MLP) / TOKENS
    more = sum(map(bytes_a_token, (fp8.forward, fp8.backward))) - sum(map(bytes_a_token, (bf16.forward, bf16.backward)))
    assert 0 < more < 3 * (factors + their_weights)


KEPT = "layout.checkpointing=selective"


def float8_products(kernels: tuple[Kernel, ...]) -> Counter:
    return Counter(kernel.product for kernel in kernels if kernel.name == FLOAT8)
