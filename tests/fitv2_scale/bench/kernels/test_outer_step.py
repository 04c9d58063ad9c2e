"""What a step does outside of its blocks, on ranks that are not there, against bytes counted by hand."""

import pytest

from fitv2_scale.bench.kernels.counts import OuterStep
from fitv2_scale.bench.kernels.predict import counted
from fitv2_scale.config.load import load_config
from tests.support.repository import ROOT

D, MLP, RANK, DEPTH = 2304, 6144, 576, 2
BLOCK = 4 * D * D + 4 * D + 3 * D * MLP + 2 * MLP + D + D * RANK + RANK + 6 * D * RANK + 6 * D
SHAPE = {"tokens": 1024, "images": 8, "max_seqlen": 256}


def count(ranks: int, nodes: int, packs: int) -> OuterStep:
    config = load_config(str(ROOT / "configs" / "fitv2_3b2.yaml"), [f"model.depth={DEPTH}"])
    words = {"what": "step", "config": config.model_dump(mode="json"), "shape": SHAPE, "packs": packs}
    return OuterStep.from_json(counted(words | {"ranks": ranks, "nodes": nodes}))


def test_hsdp_on_512_ranks():
    """64 copies of 8 shards. Of each block and pack one gather of bf16 weights in each direction, and of each block and
    step one sum of fp32 gradients over the shards and one over the copies."""
    packs = 2
    step = count(512, 64, packs)
    of_blocks = {(c.phase, c.name, c.dtype, c.bytes): c.count for c in step.collectives() if c.count % DEPTH == 0}
    assert of_blocks.pop(("forward", "_allgather_base_", "bfloat16", 2 * BLOCK)) == DEPTH * packs
    assert of_blocks.pop(("backward", "_allgather_base_", "bfloat16", 2 * BLOCK)) == DEPTH * packs
    assert of_blocks.pop(("backward", "_reduce_scatter_base_", "float32", 4 * BLOCK)) == DEPTH
    assert of_blocks.pop(("backward", "allreduce_", "float32", 4 * BLOCK // 8)) == DEPTH
    # The weights outside of the blocks are gathered once a pack, in the forward pass, and stay.
    assert {(phase, name, count) for (phase, name, *_), count in of_blocks.items()} == {
        ("forward", "_allgather_base_", packs)
    }
    of_step = [(c.phase, c.name, c.dtype) for c in step.collectives() if c.count == 1]
    assert sorted(of_step) == [
        ("backward", "_reduce_scatter_base_", "float32"),
        ("backward", "allreduce_", "float32"),
        ("step", "_allgather_base_", "float64"),  # two numbers of the norm from each of 8 ranks
    ]
    assert [c.bytes for c in step.collectives() if c.phase == "step"] == [2 * 8 * 8]


def test_a_single_rank():
    """No collective but that of the norm. AdamW reads and writes weight, gradient (which it scales) and two moments: 32
    bytes a number; EMA 12, and the norm reads 4."""
    packs = 3
    step = count(1, 1, packs)
    assert [(c.name, c.bytes) for c in step.collectives()] == [("_allgather_base_", 16)]
    assert sum(op.count * op.bytes for op in step.of("step")) / step.trained == pytest.approx(48, rel=1e-3)
    # Unsharding reads fp32, writes bf16 and copies that: 6 + 4 bytes a number, for each pass of each pack.
    of_forward = sum(op.count * op.bytes for op in step.of("forward") if op.name in ("_to_copy", "copy_"))
    assert of_forward == pytest.approx(10 * step.trained * packs, rel=0.01)
    # The first pack's gradient becomes fp32 (6), those of the others are added to it (10).
    added = sum(op.count * op.bytes for op in step.of("backward") if op.name == "add_")
    assert added == pytest.approx(10 * step.trained * (packs - 1), rel=0.01)
