"""What `fitv2 plan` says of memory, against what real ranks and real passes hold."""

import json
from dataclasses import asdict
from functools import partial

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Node
from torch.nn.attention.varlen import varlen_attn

from fitv2_scale.bench import step
from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.load import load_config
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.config.schema import Config
from fitv2_scale.model import block
from fitv2_scale.model.counts import forward_flops
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.model.packed_batch import Packing
from fitv2_scale.model.rope import by_channel, rope_table
from fitv2_scale.parallel.blocks import prepare_blocks
from fitv2_scale.parallel.memory_estimate import Compute, StateBytes, cuda_peak, saved_bytes, state_bytes, unsharded
from fitv2_scale.planning.forecast.plan_report import to_text
from tests.support.layout_grid import make_config
from tests.support.memory import HeldResults, engine_bytes
from tests.support.ranks import run_ranks


def planned(state: StateBytes) -> tuple[int, int, int, int]:
    return state.held, state.held + state.accumulated, state.held + state.gradients, state.held


CELLS = [  # world, tensor, replicate
    (1, 1, 1, "bf16"),
    (2, 1, 1, "fp32"),
    (3, 1, 1, "bf16"),
    (4, 1, 2, "fp32"),
    (2, 2, 1, "bf16"),
    (4, 2, 1, "fp32"),
]


@pytest.mark.parametrize("world,tensor,replicate,precision", CELLS)
def test_bytes_of_every_rank(world, tensor, replicate, precision):
    """Of rows that ranks share evenly, and some they do not: the label table's 6, the MLP's 64, the output's 16."""
    changes = {"layout__precision": precision, "layout__tensor": tensor, "layout__replicate": replicate}
    assert_as_planned(make_config("fsdp", **changes), world)


@pytest.mark.parametrize("world,tensor,replicate,precision", [(3, 1, 1, "bf16"), (4, 1, 2, "fp32"), (4, 2, 1, "bf16")])
def test_gathered_weights_are_held_between_packs(world, tensor, replicate, precision):
    changes = {"layout__precision": precision, "layout__tensor": tensor, "layout__replicate": replicate}
    config = make_config("fsdp", layout__reshard_after_forward="never", **changes)
    layout = Layout.of(world, replicate, tensor)
    expected = [list(planned(plan(config, layout, rank))) for rank in range(world)]
    for rank, of_rank in enumerate(expected):
        of_rank[1] += unsharded(layout, plan(config, layout, rank)) * {"bf16": 2, "fp32": 4}[precision]
    expected = [tuple(of_rank) for of_rank in expected]
    assert run_ranks(world, engine_bytes, config, expected) == expected


def test_frozen_tensors_have_no_moments_and_no_gradients():
    config = make_config("fsdp").model_copy(update={"trainable": ["blocks.*.adaLN_modulation.*", "*.bias"]})
    assert_as_planned(config, 3)


@pytest.mark.parametrize("world,tensor,precision", [(1, 1, "bf16"), (3, 1, "fp32"), (4, 2, "bf16")])
def test_bytes_of_every_rank_of_zero3(world, tensor, precision):
    """After a step: what DeepSpeed gathers for a pass and what it keeps gathered, it settles in the first one."""
    config = make_config("zero3", layout__precision=precision, layout__tensor=tensor)
    assert_zero3_as_planned(config, world)


def test_frozen_tensors_of_zero3_have_no_moments_and_no_gradients():
    config = make_config("zero3", layout__precision="bf16")
    assert_zero3_as_planned(config.model_copy(update={"trainable": ["blocks.*"]}), 2)


def assert_zero3_as_planned(config: Config, world: int) -> None:
    state = plan(config, Layout.of(world, 1, config.layout.tensor), 0)
    expected = [(None, None, None, state.held + state.gradients)] * world
    assert [found[-1] for found in run_ranks(world, engine_bytes, config, expected)] == [e[-1] for e in expected]


def plan(config: Config, layout: Layout, rank: int) -> StateBytes:
    return state_bytes(config.layout.engine, config.model, layout, config.trainable, config.layout.precision, rank)


def assert_as_planned(config: Config, world: int) -> None:
    layout = Layout.of(world, config.layout.replicate, config.layout.tensor)
    expected = [planned(plan(config, layout, rank)) for rank in range(world)]
    assert run_ranks(world, engine_bytes, config, expected) == expected


@pytest.fixture
def varlen(monkeypatch):
    """Attention by the operator that CUDA uses, which here knows its results' shapes only."""

    def attention(q, k, v, packing):
        cu, longest = packing.cu_seqlens_I1, packing.max_seqlen
        return varlen_attn(q, k, v, cu, cu, longest, longest)

    monkeypatch.setattr(block, "attention", attention)


def test_plan_of_the_published_run(capsys):
    overrides = ["data.url=preset:imagenet256", "layout.checkpointing=selective"]
    command = ["plan", "configs/fitv2_3b2.yaml", *overrides, "--nodes", "4", "--gpus-per-node", "8"]
    assert main([*command, "--json"]) == 0
    report, model = json.loads(capsys.readouterr().out), load_config("configs/fitv2_3b2.yaml").model
    assert report["model"]["forward_flops_per_image"] == {str(n): forward_flops(model, n) for n in (256, 1024)}
    layout, memory = Layout(4, 8), report["memory"]
    state = state_bytes("fsdp", model, layout, ["*"], "bf16", 0)
    assert memory["state_bytes_per_rank"] == asdict(state) | {"held": state.held}
    compute = Compute("selective", True, "bf16", memory["cuda"]["packs"], report["data"]["capacities"][-1])
    assert memory["cuda"]["peak_bytes"] == cuda_peak(model, layout, state, compute) > state.held
    # 256 images a step keep some 32 GPUs busy: beyond, the exchange of gradients takes as long as the arithmetic.
    nodes = report["nodes"]
    assert (nodes["choice"], nodes["gpus"], nodes["layout.replicate"]) == (4, 32, 4)
    assert "with 256 images per step, more nodes hardly shorten the run" in nodes["why"]
    chosen = next(c for c in nodes["tried"] if c["nodes"] == 4)
    assert chosen["seconds_a_step"] == pytest.approx(report["time"]["seconds_a_step"], rel=0.01)
    assert report["time"]["days"] == pytest.approx(
        2e6 * report["time"]["seconds_a_step"] / 86400 / report["goodput"]["expected"]
    )
    assert [beside["nodes"] for beside in report["goodput"]["beside_released"]] == [4, 16]
    assert all(beside["ours"] > beside["released"] + 0.05 for beside in report["goodput"]["beside_released"])
    text = to_text(report)
    assert "GiB on a GPU" in text
    for figure in report["assumed"].values():  # all that was not computed is named with its source
        assert figure["source"] in text


IMAGES, LONG = 2, 512  # long images, beside which what is kept an image is small
WIDE = ModelConfig(depth=1, hidden=96, heads=2, classes=5)


def block_inputs(device: str) -> tuple:
    tokens = IMAGES * LONG
    with torch.device(device):
        packing = Packing(
            cu_seqlens_I1=torch.arange(IMAGES + 1, dtype=torch.int32) * LONG,
            image_T=torch.arange(tokens) // LONG,
            place_T=torch.arange(tokens) % LONG,
            positions_T3=torch.zeros(tokens, 3, dtype=torch.int64),
            max_seqlen=LONG,
        )
        x, c, shared = (
            torch.zeros(rows, width, dtype=torch.bfloat16, requires_grad=True)
            for rows, width in ((tokens, 96), (IMAGES, 96), (IMAGES, 576))
        )
        return x, c, shared, by_channel(*rope_table(packing.positions_T2, 48, 1e4)), packing


def saved(checkpointing: str, compiled: bool) -> int:
    compute = Compute(checkpointing, compiled, "bf16", 1, IMAGES * LONG)
    return saved_bytes(WIDE, Layout(1, 1), compute)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_what_a_block_keeps_for_its_backward_pass(varlen, checkpointing):
    network = DiffusionTransformer(WIDE).to(device="meta", dtype=torch.bfloat16)
    prepare_blocks(network, checkpointing, compile_blocks=False)
    x, c, shared, rope, packing = block_inputs("meta")
    with HeldResults([*network.parameters(), *rope]) as results:
        out = network.blocks[0](x, c, shared, rope, packing)
    held = results.held()  # the result, which the next block keeps, instead of the input
    assert held == pytest.approx(saved(checkpointing, compiled=False), rel=0.01)
    del out


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_what_the_compiler_keeps_of_a_block(varlen, checkpointing, monkeypatch):
    """The compiler's own partition of a block into forward and backward, made for the CUDA operator; nothing is run."""
    kept = []

    def note_results(graph, _):
        (results,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
        values = [node for node in results[1:] if isinstance(node, Node) and node.op != "placeholder"]
        storages = {v.meta["val"].untyped_storage(): v.meta["val"] for v in values if "val" in v.meta}
        kept.append(sum(s.nbytes() for s in storages))
        raise Done

    backend = aot_autograd(
        fw_compiler=note_results,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    network = DiffusionTransformer(WIDE).to(torch.bfloat16)
    prepare_blocks(network, checkpointing, compile_blocks=True)
    x, *others = block_inputs("cpu")
    with pytest.raises(Exception, match="Done"):
        network.blocks[0](x, *others)
    assert kept[0] + x.nbytes == pytest.approx(saved(checkpointing, compiled=True), rel=0.01)


class Done(Exception):
    """The graph was seen."""


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_peak_on_a_gpu(checkpointing):
    overrides = ["data.url=preset:imagenet256", "batch.images=64", f"layout.checkpointing={checkpointing}"]
    report = step.measure(load_config("configs/fitv2_xl2.yaml", overrides), 2, 1)
    assert report["planned_peak_bytes"] == pytest.approx(report["peak_bytes"], rel=0.05)
