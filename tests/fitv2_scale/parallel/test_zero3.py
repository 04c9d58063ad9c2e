"""What is particular about the engine ``zero3``. That it trains as every engine does in every layout is in test_tensor,
what it does with what is not finite in test_nonfinite."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fitv2_scale.config.schema import Config
from fitv2_scale.model.counts import logical_shapes
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.model.objectives import make_objective
from fitv2_scale.model.packed_batch import PackedBatch
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.world import World, join
from fitv2_scale.train.loop import DONE, train
from tests.support.commits import commit_bytes
from tests.support.layout_grid import (
    STEPS,
    Cell,
    Trace,
    alone,
    assert_the_same,
    engine_of,
    loss_of,
    make_config,
    packs_of,
    run_cell,
    steps_of,
    together,
    train_cell,
    values_of,
)
from tests.support.paused_training import train_paused
from tests.support.ranks import Ranks, run_ranks
from tests.support.run_history import losses, reach, trained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
(PACK,) = packs_of(STEPS, 0, 1, 1, 1)  # no step's


def whole(config: Config, engine: Engine, world: World) -> dict[str, Tensor]:
    """All weights and EMA, whole, on every rank."""
    return together(config, [(Trace(), boxes) for boxes in world.all_gather(values_of(engine.boxes()))]).state


def output(network, pack: PackedBatch, config: Config) -> Tensor:
    noised = make_objective(config, pack.latents_TC.device).training_batch(pack)
    with torch.no_grad():
        return network(noised.x_TC, noised.t_I, noised.label_I, pack.packing)


def plain(config: Config, state: dict[str, Tensor], kind: str) -> DiffusionTransformer:
    """The network in one process, in the engine's precision, with the weights or the EMA of ``state``."""
    network = DiffusionTransformer(config.model)
    network.load_state_dict({n.removeprefix(f"{kind}/"): t for n, t in state.items() if n.startswith(f"{kind}/")})
    return network.to(DTYPES[config.layout.precision])


def initial(config: Config):
    with join() as world:
        return Trace(), values_of(engine_of(config, world).boxes())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world,tensor", [(1, 1), (3, 1), (4, 2)])
def test_initial_weights_are_those_of_fsdp(world, tensor, precision):
    """Bit for bit, and never rounded on the way: DeepSpeed's own masters begin as bf16."""
    config = make_config("zero3", layout__tensor=tensor, layout__precision=precision)
    found = together(config, run_ranks(world, initial, config)).state
    expected = together(config, run_ranks(1, initial, make_config("fsdp"))).state
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def frozen_weights_with_flips(config: Config) -> tuple[float, list[float], float]:
    """What the engine says of them: at first, with the lowest bit of a number flipped in what is computed with of each
    tensor in turn, and at last."""
    with join() as world:
        engine, flipped = engine_of(config, world), []
        before = engine.derived()["frozen weights"]
        for shard in engine._shards.values():
            if not shard.param.requires_grad:
                bits = shard.param.ds_tensor.view(torch.int16)
                bits[-1:].bitwise_xor_(1)
                flipped.append(engine.derived()["frozen weights"])
                bits[-1:].bitwise_xor_(1)
        return before, flipped, engine.derived()["frozen weights"]


def test_a_frozen_weight_that_drifts_from_its_master_is_noticed():
    """How a save is refused then is in test_copies."""
    config = make_config("zero3", layout__precision="bf16").model_copy(update={"trainable": ["blocks.*"]})
    ((before, flipped, after),) = run_ranks(1, frozen_weights_with_flips, config)
    frozen = [name for name in logical_shapes(config.model) if not name.startswith("blocks.")]
    assert before == after == 1.0
    assert len(flipped) == len(frozen) > 1 and all(map(math.isnan, flipped))


def check_outputs(config: Config) -> dict[str, bool]:
    """At every stage, whether the network computes with exactly what the boxes hold."""
    with join() as world:
        engine, same = engine_of(config, world), {}

        def check(stage: str, kind: str, state: dict[str, Tensor] | None = None) -> Tensor:
            found = output(engine.network, PACK, config)
            state = whole(config, engine, world) if state is None else state
            same[stage] = torch.equal(found, output(plain(config, state, kind), PACK, config))
            return found

        check("made", "param")
        steps_of(engine, config, Cell(world.size), world)
        before, raw = whole(config, engine, world), check("trained", "param")
        with engine.ema_weights():
            averaged = check("averaged", "ema", before)
        again = check("back", "param", before)
        after = whole(config, engine, world)
        same["restored"] = torch.equal(raw, again) and all(torch.equal(after[n], t) for n, t in before.items())
        same["telling"] = not torch.equal(raw, averaged)
        for name, logical in engine.boxes().items():
            for box in logical.boxes:
                if name.startswith("param/"):
                    box.tensor.add_(0.1)
        engine.loaded()
        same["telling"] &= not torch.equal(raw, check("loaded", "param"))
        return same


@pytest.mark.parametrize("trainable", [["*"], ["blocks.1.*", "final_layer.*"]], ids=["all", "some"])
@pytest.mark.parametrize("world,precision", [(1, "bf16"), (3, "fp32"), (3, "bf16")])
def test_the_network_computes_with_what_the_boxes_hold(world, precision, trainable):
    config = make_config("zero3", layout__precision=precision).model_copy(update={"trainable": trainable})
    for same in run_ranks(world, check_outputs, config):
        assert all(same.values()), same


def reduced_gradients(config: Config) -> list[bool]:
    """Whether a rank's part of the gradient, of one pack and of two, has more digits than bf16."""
    with join() as world:
        engine, finer = engine_of(config, world), []
        for last, pack in enumerate(packs_of(0, world.rank, world.size, 2, 1)):
            engine.backward(loss_of(engine.network, pack, config), last=bool(last))
            parts = engine.network.optimizer.averaged_gradients[0]
            assert all(part.dtype == torch.float32 for part in parts)
            finer.append(any((part != part.bfloat16()).any() for part in parts))
        return finer


def test_bf16_gradients_are_added_in_fp32():
    """Over ranks and over packs. DeepSpeed halves them for two ranks, which is exact: all digits are from adding."""
    assert run_ranks(2, reduced_gradients, make_config("zero3", layout__precision="bf16")) == [[True, True]] * 2


def train_in_small_pieces(config: Config, cell: Cell):
    import fitv2_scale.parallel.deepspeed_setup as stage3

    for name, elements in {"ZERO3_BUCKET": 5_000, "_SUB_GROUP": 3_000}.items():
        assert hasattr(stage3, name)
        setattr(stage3, name, elements)
    return train_cell(config, cell)


def test_a_large_network_is_reduced_and_updated_in_pieces():
    """By the bucket and by the group of tensors: several optimizer states, as of billions of weights."""
    config, cell = make_config("zero3"), Cell(2, packs=2)
    assert_the_same(together(config, run_ranks(2, train_in_small_pieces, config, cell)), alone(make_config()))


@pytest.mark.parametrize("cell,checkpointing", [(Cell(2, packs=2), "selective"), (Cell(4, 2), "full")], ids=str)
def test_what_is_computed_again_is_the_same(cell, checkpointing):
    """Weights are gathered for it once more."""
    assert_the_same(run_cell("zero3", cell, layout__checkpointing=checkpointing), alone(make_config()))


def count_graphs(config: Config, cell: Cell) -> tuple[Trace, dict, int]:
    trace, boxes = train_cell(config, cell)
    return trace, boxes, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_blocks_train_the_same():
    """In as many pieces as without DeepSpeed: it gathers and reduces around a block, not inside."""
    config = make_config("zero3", layout__compile=True)
    *ranks, graphs = zip(*run_ranks(2, count_graphs, config, Cell(2)), strict=True)
    assert_the_same(together(config, list(zip(*ranks, strict=True))), alone(make_config()))
    (expected,) = (n for *_, n in run_ranks(1, count_graphs, make_config(layout__compile=True), Cell(1)))
    assert graphs == (expected, expected)


def held_after_forward(config: Config) -> tuple[int, int]:
    """Bytes of gathered weight matrices that were there during a forward pass, and those that are left after it."""
    with join() as world:
        engine, gathered = engine_of(config, world), {}

        def note(module: nn.Linear, *_) -> None:
            storage = module.weight.data.untyped_storage()
            gathered[StorageWeakRef(storage)] = storage.nbytes()

        for module in engine.network.module.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(note, prepend=True)
        loss = loss_of(engine.network, PACK, config)
        left = sum(size for storage, size in gathered.items() if not storage.expired())
        engine.backward(loss, last=True)
        return sum(gathered.values()), left


def test_gathered_weights_are_dropped_between_forward_and_backward():
    for gathered, left in run_ranks(2, held_after_forward, make_config("zero3")):
        assert gathered > 0 and left == 0


def train_watched(config: Config, watched: bool):
    """Trains; if ``watched``, with samples in between, before the first step and of another shape."""
    cell = Cell(2, packs=2)
    with join() as world:
        engine = engine_of(config, world)
        step, pack = engine.step, packs_of(STEPS, 0, 2, 2, 2)[0]

        def sampling_step(lr: float, max_norm: float):
            result = step(lr, max_norm)
            with engine.ema_weights():
                for _ in range(2):
                    output(engine.network, pack, config)
            return result

        if watched:
            output(engine.network, pack, config)
            engine.step = sampling_step
        return steps_of(engine, config, cell, world), values_of(engine.boxes())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sampling_in_between_leaves_no_trace(precision):
    config = make_config("zero3", layout__precision=precision)
    alone, watched = (run_ranks(2, train_watched, config, watched) for watched in (False, True))
    for (trace, boxes), (other, others) in zip(alone, watched, strict=True):
        assert trace == other
        for name in boxes:
            for (_, a), (_, b) in zip(boxes[name], others[name], strict=True):
                assert (a == b).all(), name


@pytest.mark.parametrize(
    "world,layout", [(2, {"precision": "bf16", "checkpointing": "selective"}), (4, {"tensor": 2})], ids=str
)
def test_a_killed_run_ends_bit_equal(tiny, world, layout):
    changes = {f"layout__{key}": value for key, value in layout.items()} | {"layout__engine": "zero3"}
    changes |= {"train__steps": 16, "layout__max_tokens": 64}  # several packs a step
    whole, killed = tiny("whole", **changes), tiny("killed", **changes)
    assert run_ranks(world, train, whole) == [DONE] * world
    ranks = Ranks(world, train_paused, killed, 12)
    reach(killed.run, 8, 1)
    ranks.kill()
    assert run_ranks(world, train, killed) == [DONE] * world
    assert commit_bytes(killed.run) == commit_bytes(whole.run)
    assert losses(killed.run) == losses(whole.run)


def test_a_run_goes_from_engine_to_engine(tiny):
    """Ten steps each, on another number of ranks, against thirty alone with fsdp."""
    whole, legs = tiny("whole", train__steps=30), (("zero3", 2, 1), ("fsdp", 3, 1), ("zero3", 4, 2))
    assert run_ranks(1, train, whole) == [DONE]
    for leg, (engine, world, tensor) in enumerate(legs, 1):
        moved = tiny("moved", train__steps=10 * leg, layout__engine=engine, layout__tensor=tensor)
        assert run_ranks(world, train, moved) == [DONE] * world
    assert trained(moved.run) == trained(whole.run)
    assert losses(moved.run) == pytest.approx(losses(whole.run), rel=1e-6)
