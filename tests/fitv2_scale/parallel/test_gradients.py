"""What ranks do with one another's gradients: they add them in float32, and no copies drift apart; and how many steps
AdamW has counted."""

import pytest
import torch

from fitv2_scale.config.schema import Config
from fitv2_scale.parallel.world import join
from tests.support.layout_grid import Boxes, Trace, engine_of, loss_of, make_config, packs_of, together, values_of
from tests.support.ranks import run_ranks


def reduced(config: Config, packs: int) -> bool:
    """Whether the sum over the ranks of a step's gradients, each of which bf16 computed, has more digits than bf16."""
    with join() as world:
        engine = engine_of(config, world)
        for k, pack in enumerate(packs_of(0, world.rank, world.size, packs, 1)):
            loss = loss_of(engine.network, pack, config)
            engine.backward(loss, last=k == packs - 1)
        grads = [p.grad.to_local() for p in engine.network.parameters()]
        assert all(grad.dtype == torch.float32 for grad in grads)
        return any(bool((grad != grad.bfloat16()).any()) for grad in grads)


@pytest.mark.parametrize("packs", [1, 2])
def test_fsdp_adds_gradients_of_bf16_in_float32(packs):
    assert run_ranks(2, reduced, make_config("fsdp", layout__precision="bf16"), packs) == [True, True]


def disturbed(config: Config) -> tuple[Trace, Boxes]:
    """Three steps in which each rank of a tensor group computes slightly other gradients, as a GPU may."""
    with join() as world:
        engine = engine_of(config, world)
        for step in range(3):
            (pack,) = packs_of(step, 0, 1, 1, 1)
            loss = loss_of(engine.network, pack, config)
            engine.backward(loss * (1 + 0.01 * world.rank), last=True)
            engine.step(config.optimizer.lr_at(step), config.optimizer.max_norm)
        return Trace(), values_of(engine.boxes())


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_copies_in_a_tensor_group_stay_bit_equal(engine):
    config = make_config(engine, layout__tensor=2)
    ranks = run_ranks(2, disturbed, config)
    assert together(config, ranks).state  # which compares every two values of one element
    (_, first), (_, second) = ranks
    copies = [
        (a, b)
        for name, mine in first.items()
        for (at, a), (there, b) in zip(mine, second[name], strict=False)
        if at == there and a.shape == b.shape and name.startswith(("param/", "exp_avg"))
    ]
    assert len(copies) > 20 and all((a == b).all() for a, b in copies)


def counted(config: Config) -> list[dict[str, float]]:
    """What an engine says of its steps: at first, after loading a commit of step 41, and one step later."""
    with join() as world:
        engine = engine_of(config, world)
        found = [engine.scalars()]
        engine.load_scalars({"optimizer_step": 41.0})
        found.append(engine.scalars())
        (pack,) = packs_of(0, 0, 1, 1, 1)
        engine.backward(loss_of(engine.network, pack, config), last=True)
        engine.step(config.optimizer.lr_at(0), config.optimizer.max_norm)
        return [*found, engine.scalars()]


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_a_resumed_engine_counts_steps_from_where_the_commit_was(engine):
    expected = [{"optimizer_step": steps} for steps in (0.0, 41.0, 42.0)]
    assert run_ranks(1, counted, make_config(engine)) == [expected]
