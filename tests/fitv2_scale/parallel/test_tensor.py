"""Every layout trains the same: any engine on any number of processes, with and without tensor parallelism, against
plain PyTorch in one process. ``layout_grid`` says how."""

import sys
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist

import fitv2_scale.parallel.fsdp
from data_sharding.errors import UserError
from fitv2_scale.config.layout import Layout, LayoutConfig
from fitv2_scale.config.schema import Config
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.evaluate.sampling.sampler import ImageRequest, sample
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.tensor import tensor_linear
from fitv2_scale.parallel.tensor_pieces import TensorGroup
from fitv2_scale.parallel.world import join
from fitv2_scale.train.loop import train
from tests.support.commits import commit_bytes
from tests.support.layout_grid import (
    STEPS,
    Cell,
    alone,
    assert_the_same,
    make_config,
    oracle,
    run_cell,
    steps_of,
    together,
    train_cell,
)
from tests.support.ranks import run_ranks
from tests.support.run_history import losses, trained

ENGINES = ["fsdp", "zero3"]
ALL = [Cell(w, t) for w in (1, 2, 3, 4, 6) for t in (1, 2, 3) if w % t == 0]
REPLICATED = [Cell(4, 1, 2), Cell(6, 1, 3), Cell(4, 2, 2), Cell(8, 2, 2)]
PACKED = [Cell(2, 2, packs=2, room=2), Cell(3, 3, packs=4), Cell(2, 1, packs=4, room=3), Cell(1, packs=2, room=4)]
HEADS_ONLY = ["blocks.*.adaLN_modulation.*"]


@pytest.mark.parametrize("engine,cell", [*product(ENGINES, ALL), *(("fsdp", cell) for cell in REPLICATED)], ids=str)
def test_every_layout_trains_the_same(engine, cell):
    assert_the_same(run_cell(engine, cell), oracle(()))


@pytest.mark.parametrize("cell", PACKED, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_packing_does_not_matter(engine, cell):
    """One, two and four packs a step, of four capacities."""
    assert_the_same(run_cell(engine, cell), oracle(()))


@pytest.mark.parametrize(
    "cell,changes",
    [
        (Cell(2, 2), {"model__qk_norm": "l2_scale"}),
        (Cell(6, 3), {"model__qk_norm": "l2_scale", "model__adaln": "full"}),
        (Cell(3, 3), {"model__qk_norm": "none"}),
        (Cell(4, 2), {"model__adaln": "full"}),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else str(value),
)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_cookbook_trains_the_same(engine, cell, changes):
    assert_the_same(run_cell(engine, cell, **changes), oracle(tuple(changes.items())))


@pytest.mark.parametrize("cell", [Cell(3, 1), Cell(4, 2)], ids=str)
@pytest.mark.parametrize(
    "trainable", [HEADS_ONLY, ["blocks.0.attn.*", "*.mlp.fc2.weight"], ["*.bias"]], ids=["heads", "parts", "biases"]
)
@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_tensors_train_the_same(engine, trainable, cell):
    config = make_config(engine, layout__tensor=cell.tensor).model_copy(update={"trainable": trainable})
    assert_the_same(together(config, run_ranks(cell.world, train_cell, config, cell)), alone(config))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("cell", [Cell(3, 1), Cell(2, 2), Cell(6, 3)], ids=str)
def test_gate_and_value_as_one_product_train_the_same(cell, checkpointing):
    """64 units, which three ranks pad to 22 each."""
    layout = {"layout__gate_and_value": "merged", "layout__checkpointing": checkpointing}
    assert_the_same(run_cell("fsdp", cell, **layout), oracle(()))


@pytest.mark.parametrize("product", ["separate", "merged"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("cell", [Cell(3), Cell(2, 2, packs=2), Cell(6, 3)], ids=str)
def test_written_kernels_train_the_same(cell, checkpointing, product):
    layout = {"layout__kernels": "triton", "layout__gate_and_value": product, "layout__checkpointing": checkpointing}
    assert_the_same(run_cell("fsdp", cell, layout__reshard_after_forward="never", **layout), oracle(()))


@pytest.mark.parametrize("kernels", ["compiled", "triton"])
@pytest.mark.parametrize("trainable", [["*.fc1_x.weight"], ["*.bias"]], ids=["one of two", "biases"])
@pytest.mark.parametrize("cell", [Cell(2, 1), Cell(2, 2)], ids=str)
def test_one_product_of_frozen_weights_trains_the_same(cell, trainable, kernels):
    config = make_config(layout__tensor=cell.tensor, layout__gate_and_value="merged", layout__kernels=kernels)
    config = config.model_copy(update={"trainable": trainable})
    assert_the_same(together(config, run_ranks(cell.world, train_cell, config, cell)), alone(config))


@pytest.mark.parametrize("cell", [Cell(1), Cell(2, 2), Cell(6, 3)], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_stays_near_fp32(engine, cell):
    """bf16 rounds by up to 2**-9 of a value. The norm adds up roundings of either sign: it may be off by twice that.
    The first outputs are zero, so the loss, about its target's own square, hardly feels it. AdamW takes a step of the
    same size however small a gradient, so weights with hardly any may go another way; most go the same, and all
    together end within an eighth of the way that training went (measured: 0.10, alone and in groups alike)."""
    slow = {"optimizer__lr": 1e-3}
    found, expected = run_cell(engine, cell, layout__precision="bf16", **slow), oracle(tuple(slow.items()))
    assert found.losses == pytest.approx(expected.losses, rel=2**-12)
    assert found.norms == pytest.approx(expected.norms, rel=2**-8)
    assert found.norms != expected.norms
    for kind in ("param", "ema"):
        off, moved = 0.0, 0.0
        for name, value in expected.state.items():
            if name.startswith(kind):
                off += (found.state[name] - value).square().sum().item()
                moved += (expected.initial[name.split("/", 1)[1]] - value).square().sum().item()
        assert off**0.5 < moved**0.5 / 8


@pytest.mark.parametrize("cell", [Cell(2, 2), Cell(6, 3)], ids=str)
def test_gradients_of_replicated_tensors_are_bit_equal(cell):
    """Before any rank is given another's: by computation alone."""
    config = make_config(layout__tensor=cell.tensor)
    for names in run_ranks(cell.world, compare_gradients, config, cell):
        assert names == STEPS


def compare_gradients(config: Config, cell: Cell) -> int:
    """Trains; returns the steps in which all ranks of the tensor group had the same gradients."""
    equal = 0

    def compare(grads: list[torch.Tensor], group: TensorGroup) -> None:
        nonlocal equal
        assert group.size == cell.tensor and len(grads) > 20 and any(g.count_nonzero() for g in grads)
        mine = torch.cat([g.flatten() for g in grads])
        everyones = [torch.empty_like(mine) for _ in range(group.size)]
        dist.all_gather(everyones, mine, group=group.group)
        equal += all(torch.equal(everyones[0], other) for other in everyones)

    with join() as world:
        engine = make_engine(config, Layout.of(world.size, 1, cell.tensor), world)
        fitv2_scale.parallel.fsdp.broadcast_in_group = compare
        steps_of(engine, config, cell, world)
        return equal


def test_units_that_do_not_exist_stay_zero():
    """64 units on three ranks, 22 each: the last two of the last rank's. Weight decay and EMA included."""
    config = make_config(layout__tensor=3)
    assert run_ranks(3, train_and_look_outside_boxes, config) == [0, 0, 2]


def train_and_look_outside_boxes(config: Config) -> int:
    """The number of units of the first SwiGLU that are in no box, after checking that all about them is zero."""
    with join() as world:
        engine = make_engine(config, Layout.of(world.size, 1, 3), world)
        steps_of(engine, config, Cell(3, 3), world)
        left = {name: p.to_local().detach() for name, p in engine.network.named_parameters()}
        outside = {name: torch.ones_like(local, dtype=torch.bool) for name, local in left.items()}
        for name, local in left.items():
            for box in engine.boxes()[f"param/{name}"].boxes:
                at = (box.tensor.storage_offset() - local.storage_offset()) if box.tensor.numel() else 0
                torch.as_strided(outside[name], box.tensor.shape, box.tensor.stride(), at).fill_(False)
        for name, mask in outside.items():
            assert not left[name][mask].any(), name
        gate, down = (outside[f"blocks.0.mlp.{name}.weight"] for name in ("fc1_g", "fc2"))
        assert gate.any(1).sum() == down.any(0).sum()
        return int(gate.all(1).sum())


SIX_HEADS = {"model__hidden": 24, "model__heads": 6}


def test_a_run_continues_in_other_tensor_groups(tiny):
    """Ten steps each in a group of two, alone, and in a group of three, against thirty alone."""
    whole, moved = tiny("whole", train__steps=30, **SIX_HEADS), {"name": "moved", **SIX_HEADS}
    assert run_ranks(1, train, whole) == [0]
    for world, tensor, steps in ((4, 2, 10), (1, 1, 20), (3, 3, 30)):
        config = tiny(layout__tensor=tensor, train__steps=steps, **moved)
        assert run_ranks(world, train, config) == [0] * world
    assert trained(config.run) == trained(whole.run)  # ids, times, noise: each once, though two or three ranks saw it
    assert losses(config.run) == pytest.approx(losses(whole.run), rel=1e-6)


def test_a_tensor_group_resumes_bit_equal(tiny):
    whole, halves = (tiny(name, layout__tensor=2, train__steps=10, **SIX_HEADS) for name in ("whole", "halves"))
    assert run_ranks(2, train, whole) == [0, 0]
    assert run_ranks(2, train, tiny("halves", layout__tensor=2, train__steps=6, **SIX_HEADS)) == [0, 0]
    assert run_ranks(2, train, halves) == [0, 0]
    assert commit_bytes(halves.run) == commit_bytes(whole.run)
    assert losses(halves.run) == losses(whole.run)


def test_a_tensor_group_makes_the_same_pictures():
    alone, together = run_ranks(1, make_pictures, 1)[0], run_ranks(4, make_pictures, 2)
    for found in together:
        assert found.keys() == alone.keys() == {0, 1, 2}
        for index, picture in alone.items():
            np.testing.assert_allclose(found[index], picture, rtol=0, atol=1e-5)


def make_pictures(tensor: int) -> dict[int, np.ndarray]:
    config, requests = make_config(), [ImageRequest(i, label=i, rows=2 + i, columns=3) for i in range(3)]
    with join() as world:
        engine = make_engine(config, Layout.of(world.size, 1, tensor), world)
        steps_of(engine, config, Cell(world.size, tensor), world)  # before the first step the velocity is zero
        with engine.ema_weights():
            options = {"model": config.model, "objective": "flow", "sampling": SamplingConfig(steps=3), "seed": 0}
            made = sample(engine.network, requests, **options, world=world, tensor=tensor)
            return {request.index: one.tokens for request, one in made.items()}


def test_compiled_blocks_train_the_same_in_a_tensor_group():
    """The compiler leaves megatron-core's linears out, and compiles what lies between them."""
    shallow = {"model__depth": 1}
    assert_the_same(run_cell("fsdp", Cell(2, 2), layout__compile=True, **shallow), oracle(tuple(shallow.items())))


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_what_is_computed_again_is_the_same_in_a_tensor_group(checkpointing):
    """Sums over the group are made again too, by all ranks alike."""
    assert_the_same(run_cell("fsdp", Cell(2, 2), layout__checkpointing=checkpointing), oracle(()))


def test_without_megatron_core_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron", None)
    monkeypatch.delitem(sys.modules, "fitv2_scale.parallel.megatron", raising=False)
    for name in [name for name in sys.modules if name.startswith("megatron.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"^layout.tensor > 1 needs megatron-core: pip install -e '\.\[tensor\]'$"):
        tensor_linear(TensorGroup(0, 2, None))
    assert isinstance(tensor_linear(TensorGroup())(2, 3, "column"), torch.nn.Linear)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"tensor": 4}, "test: layout.tensor is 4, which does not divide the 6 heads of the model"),
        (
            {"engine": "zero3", "replicate": 2},
            "layout.replicate is 2, but zero3 keeps one copy: use layout.engine=fsdp",
        ),
        (
            {"engine": "zero3", "gate_and_value": "merged"},
            "layout.gate_and_value=merged is for layout.engine=fsdp: leave it out with zero3",
        ),
        ({"engine": "zero3", "reshard_after_forward": "never"}, "layout.reshard_after_forward=never is for layout"),
        ({"engine": "zero3", "prefetch_blocks": 2}, "layout.prefetch_blocks=2 is for layout.engine=fsdp: leave it out"),
        ({"engine": "zero3", "kernels": "triton"}, "layout.kernels=triton is for layout.engine=fsdp: leave it out"),
    ],
)
def test_a_layout_that_does_not_suit_the_model_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_config(**{f"layout__{key}": value for key, value in changes.items()})


@pytest.mark.parametrize(
    "world,replicate,tensor,message",
    [
        (3, 2, 1, "layout.replicate is 2, which does not divide the 3 processes started: choose a divisor"),
        (3, 1, 2, "layout.tensor is 2, which does not divide the 3 processes"),
        (6, 2, 2, "layout.replicate x layout.tensor is 4, which does not divide the 6 processes"),
    ],
)
def test_a_layout_that_does_not_fit_the_processes_is_refused(world, replicate, tensor, message):
    with pytest.raises(UserError, match=message):
        Layout.of(world, replicate, tensor)


def test_ranks_are_numbered_tensor_first():
    layout = Layout.of(12, 2, 2)
    assert (layout.replicate, layout.shard, layout.tensor, layout.data_parallel) == (2, 3, 2, 6)
    assert [(layout.data_rank(r), layout.tensor_rank(r)) for r in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize(
    "engine,ranks,nodes,tensor,expected",
    [
        ("fsdp", 32, 4, 1, (4, 8, 1)),  # one copy a node
        ("fsdp", 32, 4, 2, (4, 4, 2)),
        ("fsdp", 30, 4, 1, (1, 30, 1)),  # nodes that differ
        ("fsdp", 8, 1, 1, (1, 8, 1)),
        ("zero3", 32, 4, 1, (1, 32, 1)),
    ],
)
def test_a_copy_of_the_state_a_node(engine, ranks, nodes, tensor, expected):
    layout = LayoutConfig(engine=engine, tensor=tensor).over(ranks, nodes)
    assert (layout.replicate, layout.shard, layout.tensor) == expected
