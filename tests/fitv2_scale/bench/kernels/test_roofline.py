"""The arithmetic from counts to a step, against steps that are added up by hand."""

from dataclasses import replace

import pytest

from fitv2_scale.bench.kernels.counts import CompiledBlock, Kernel, Operation, OuterStep, Workload
from fitv2_scale.bench.kernels.gpus import GPUS, Gpu, Rate
from fitv2_scale.bench.kernels.roofline import predict, product_seconds
from fitv2_scale.config.model import ModelConfig


def rate(value: float) -> Rate:
    return Rate(value, "of this test")


GPU: Gpu = replace(
    GPUS["H200"],
    processors=10,
    tile=(100, 100),
    peak_flops=rate(1e12),
    product_flops=rate(5e11),
    attention_forward_flops=rate(2e11),
    attention_backward_flops=rate(1e11),
    elementwise_bytes=rate(1e9),
    copy_bytes=rate(2e9),
    kernel_seconds=rate(1e-3),
    launch_seconds=rate(0.0),
    block_seconds=rate(0.0),
)
MODEL = ModelConfig(depth=2, hidden=192, heads=3, classes=10)  # head_dim 64
WORK = Workload(ranks=1, tokens=1000, slots=4, max_seqlen=256, packs=3.0, fill=0.9, keys=200.0, flops=1e12)
NOTHING = OuterStep((), 1)
EMPTY = CompiledBlock(1, 0, (), (Kernel("mm", "product", 0, (1000, 100, 1000)),))


def never(computing: float) -> float:
    return 0.0


def test_a_product_whose_tiles_fill_all_processors():
    assert product_seconds(1000, 100, 500, GPU) == pytest.approx(2 * 1000 * 100 * 500 / 5e11)


def test_a_product_in_fp8_has_its_own_rate():
    """And its bytes: here they are less."""
    gpu = replace(GPU, float8_flops=rate(2e12))
    assert product_seconds(1000, 100, 500, gpu, float8=True) == pytest.approx(2 * 1000 * 100 * 500 / 2e12)
    for name, seconds in (("_scaled_mm", 0.1), ("mm", 0.4)):
        block = CompiledBlock(1, 0, (), (Kernel(name, "product", 0, (1000, 100, 10**6)),))
        parts = predict(MODEL, block, NOTHING, WORK, gpu, never).seconds_by_part
        assert parts["products"] == pytest.approx(2 * 3 * seconds)  # blocks and packs


def test_a_product_with_a_round_that_is_mostly_empty():
    """11 tiles take two rounds of 10."""
    assert product_seconds(1100, 100, 500, GPU) == pytest.approx(2 * 1100 * 100 * 500 / (5e11 * 11 / 20))


def test_the_projection_of_3b2_leaves_processors_empty():
    """2,304 x 2,304 is 18 x 9 tiles of 128 x 256: 162 in two rounds of 132."""
    seconds = product_seconds(2304, 2304, 16384, GPUS["H200"])
    assert seconds == pytest.approx(2 * 2304 * 2304 * 16384 / (748e12 * 162 / 264))


def test_a_small_product_is_split_over_its_sum():
    """Two tiles in four parts each fill 8 of 10 processors; the parts are written and added."""
    added = 2 * 4 * 4 * 200 * 100 / 1e9
    assert product_seconds(200, 100, 4096, GPU) == pytest.approx(2 * 200 * 100 * 4096 / (5e11 * 0.8) + added)


def test_a_step_of_all_kinds():
    kernels = (
        Kernel("triton_a", "triton", 5_000_000),  # 5 ms
        Kernel("triton_b", "triton", 10),  # the shortest kernel: 1 ms
        Kernel("mm", "product", 0, (1000, 100, 10_000)),  # 2e9 FLOPs: 4 ms
        Kernel("torch_attn._varlen_attn.default", "attention", 2_000_000),  # 1 ms, and its FLOPs
    )
    backward = (Kernel("torch_attn._varlen_attn_backward.default", "attention", 0),)
    outer = OuterStep(
        (
            Operation("data", "mul", 0, "", False, 2),  # 2 ms
            Operation("forward", "copy_", 20_000_000, "", False, 1),  # 10 ms
            Operation("backward", "_allgather_base_", 10**9, "bfloat16", True, 7),  # a transfer, not of the GPU
            Operation("step", "_fused_adamw_", 8_000_000, "", False, 1),  # 4 ms
        ),
        1,
    )
    waiting = 0.125
    found = predict(MODEL, CompiledBlock(1, 0, kernels, backward), outer, WORK, GPU, lambda computing: waiting)
    attention = 1000 * 4 * 192 * 200  # FLOPs of a pack and block
    by_hand = {
        "products": 6 * 0.004,
        "elementwise": 6 * 0.006,
        "attention": 6 * (attention / 2e11 + 0.001 + 2.5 * attention / 1e11),
        "data and noise": 0.002,
        "weights and gradients outside the blocks": 0.010,
        "optimizer": 0.004,
    }
    assert found.seconds_by_part == pytest.approx(by_hand)
    assert found.seconds == pytest.approx(sum(by_hand.values()) + waiting)
    assert found.mfu == pytest.approx(1e12 / 1e12 / found.seconds)
    assert found.tokens_per_second == pytest.approx(3 * 1000 * 0.9 / found.seconds)
    assert sum(found.losses.values()) + 1e12 / 1e12 == pytest.approx(found.seconds)
    assert list(found.losses.values()) == sorted(found.losses.values(), reverse=True)


def test_heads_that_are_padded():
    """FlashAttention has no kernel for 72 channels a head; that for 96 does a third more work."""
    attention = CompiledBlock(1, 0, (Kernel("_varlen_attn", "attention", 0), *EMPTY.backward), ())
    wide, narrow = (
        predict(replace_model(hidden, heads), attention, NOTHING, WORK, GPU, never).seconds_by_part["attention"]
        for hidden, heads in ((192, 2), (144, 2))
    )
    assert narrow / wide == pytest.approx(72 / 96 * 96 / 72)


def replace_model(hidden: int, heads: int) -> ModelConfig:
    return ModelConfig(depth=2, hidden=hidden, heads=heads, classes=10)


def test_a_host_that_is_slower_than_the_gpu():
    """Of a block and pack one kernel and the hooks before and after it, and 100 operations beside the blocks."""
    slow = replace(GPU, launch_seconds=rate(0.01), block_seconds=rate(0.1))
    outer = OuterStep((Operation("data", "mul", 0, "", False, 100),), 1)
    found = predict(MODEL, EMPTY, outer, WORK, slow, never)
    assert found.host_seconds == pytest.approx(6 * (0.01 + 0.2) + 100 * 0.01)
    assert found.seconds == pytest.approx(found.host_seconds)
    assert found.losses["the GPU waits for the host"] == pytest.approx(
        found.seconds - sum(found.seconds_by_part.values())
    )
