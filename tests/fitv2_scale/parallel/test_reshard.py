"""Weights gathered once a step instead of twice a pack: the same bits, with fewer collectives."""

from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.world import join
from tests.support.layout_grid import Cell, make_config, packs_of, run_cell, steps_of, values_of
from tests.support.ranks import run_ranks

CELLS = [Cell(1, packs=2), Cell(2, packs=3), Cell(4, packs=2), Cell(4, 1, 2, packs=3), Cell(4, 2, packs=2)]
WAYS = ("always", "never")


@pytest.mark.parametrize("precision,cell", [*product(["fp32"], CELLS), ("bf16", CELLS[1])], ids=str)
def test_the_bits_are_the_same(precision, cell):
    always, never = (
        run_cell("fsdp", cell, layout__reshard_after_forward=way, layout__precision=precision) for way in WAYS
    )
    assert (never.losses, never.norms) == (always.losses, always.norms)
    assert never.state.keys() == always.state.keys()
    assert all(torch.equal(never.state[name], value) for name, value in always.state.items())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("depth", [2, 16])
def test_the_bits_are_the_same_with_blocks_gathered_ahead(depth, way):
    one, ahead = (
        run_cell("fsdp", Cell(2, packs=2), layout__prefetch_blocks=blocks, layout__reshard_after_forward=way)
        for blocks in (1, depth)
    )
    assert (ahead.losses, ahead.norms) == (one.losses, one.norms)
    assert all(torch.equal(ahead.state[name], value) for name, value in one.state.items())


def test_which_blocks_are_gathered_ahead():
    """When block 0 of four computes forwards, and block 3 backwards: with a depth of 2."""
    assert run_ranks(2, blocks_there, 2) == [([True, True, True, False], [False, True, True, True])] * 2
    assert run_ranks(2, blocks_there, 1)[0][0] == [True, False, False, False]  # as yet nothing is known of the order


def blocks_there(depth: int) -> tuple[list[bool], list[bool]]:
    """Which blocks have asked for their weights when the first one computes, in either pass, of the first step."""
    config, cell = make_config(layout__prefetch_blocks=depth, model__depth=4), Cell(2)
    with join() as world:
        engine = make_engine(config, Layout.of(world.size, 1), world)
        blocks, seen = list(engine.network.blocks), {}

        def look(name: str) -> None:
            if name not in seen:
                groups = [block._get_fsdp_state()._fsdp_param_group for block in blocks]
                seen[name] = [group.is_unsharded or group._all_gather_result is not None for group in groups]

        blocks[0].attn.register_forward_hook(lambda *_: look("forward"))
        blocks[-1].attn.register_full_backward_hook(lambda *_: look("backward"))
        steps_of(engine, config, cell, world, [0])
        return seen["forward"], seen["backward"]


@pytest.mark.parametrize("way,gathered", [("always", 3 * (2 + 1) + 3 * 2), ("never", 2 + 1)])
def test_gathers_of_a_step(way, gathered):
    """Of two blocks and of what is outside them, in three packs. Always: each before every forward pass, and the blocks
    again before every backward pass. Never: each once. What is outside stays between the two passes either way. The
    ranks also share the parts of the gradient's norm, by one gather more."""
    assert run_ranks(2, gathers, way, 3) == [gathered + 1] * 2


class Gathers(TorchDispatchMode):
    """Counts all-gathers."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "allgather" in str(func)
        return func(*args, **(kwargs or {}))


def gathers(way: str, packs: int) -> int:
    """All-gathers of the second step of a rank."""
    config, cell = make_config(layout__reshard_after_forward=way), Cell(2, packs=packs)
    with join() as world:
        engine = make_engine(config, Layout.of(world.size, 1), world)
        steps_of(engine, config, cell, world, [0])
        with Gathers() as found:
            steps_of(engine, config, cell, world, [1])
        return found.count


def test_other_weights_are_used_between_steps():
    """A pass with the averaged weights, without gradients, leaves all weights gathered: they are freed before others
    are used."""
    config = make_config(layout__reshard_after_forward="never")
    (found, expected), *_ = run_ranks(2, passes_between_steps, config)
    assert found == expected


def passes_between_steps(config: Config) -> tuple[list[bool], list[bool]]:
    cell = Cell(2, packs=2)
    with join() as world:
        engines = [
            make_engine(make_config(layout__reshard_after_forward=way), Layout.of(world.size, 1), world) for way in WAYS
        ]
        pack, found = packs_of(0, world.rank, 2, 1, 1)[0], []
        inputs = (pack.latents_TC, torch.rand(len(pack.label_I)), pack.label_I, pack.packing)
        for step in range(3):
            outs = []
            for engine in engines:
                steps_of(engine, config, cell, world, [step])
                with torch.no_grad():
                    own = engine.network(*inputs)
                    with engine.ema_weights():
                        averaged = engine.network(*inputs)
                outs.append((own, averaged, engine.network(*inputs).detach()))
            always, never = outs
            found += [all(torch.equal(a, b) for a, b in zip(always, never, strict=True)), torch.equal(*never[:2])]
        held = [{name: [v.tolist() for _, v in b] for name, b in values_of(e.boxes()).items()} for e in engines]
        return [*found, held[0] == held[1]], [True, False] * 3 + [True]
