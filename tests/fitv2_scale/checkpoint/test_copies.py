"""Copies of the state are compared at every save: a flipped bit is never committed, whichever copy it is in."""

import json
import socket
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import fitv2_scale.train.loop as module
from fitv2_scale.checkpoint.checkpointer import Checkpointer
from fitv2_scale.checkpoint.copies import CopiesDiffer, require_equal_copies
from fitv2_scale.parallel.boxes import Box, LogicalTensor
from fitv2_scale.parallel.fsdp import FSDPEngine
from fitv2_scale.parallel.state_copy import StateCopy
from fitv2_scale.parallel.zero3 import Zero3Engine
from fitv2_scale.run.run import Attempt, Run
from fitv2_scale.run.status import status
from fitv2_scale.train.loop import DONE, RETRY, train
from tests.support.checkpoint_state import CURSOR, opened
from tests.support.commits import commit_bytes
from tests.support.layout_grid import Cell, engine_of, make_config, steps_of
from tests.support.ranks import run_ranks
from tests.support.thread_ranks import outcomes

SPLIT, REPLICATED = "blocks.0.mlp.fc2.weight", "blocks.1.adaLN_modulation.1.weight"
KINDS = ("param", "ema", "exp_avg", "exp_avg_sq")
NODE = socket.gethostname()


def compared(replicas: int, off: dict[int, list[str]], **scalars) -> str:
    """What is raised on all ranks alike, each with its replica of six tensors, with a bit flipped in those of ``off``;
    empty if nothing is."""

    def act(world):
        tensors = {f"param/{letter}": torch.ones(3) for letter in "abcdef"}
        for letter in off.get(world.rank, []):
            tensors[f"param/{letter}"].view(torch.int32)[1:2].bitwise_xor_(1)
        boxes = {name: LogicalTensor((3,), [Box((0,), tensor)]) for name, tensor in tensors.items()}
        require_equal_copies(boxes, {"step": 8} | scalars, StateCopy(world.rank, replicas), world)

    (said,) = {str(error or "") for error in outcomes(replicas, act)}
    return said.removeprefix("step 8 is not committed, because the state is corrupt: ").partition(". ")[0]


def test_what_differs_and_where_is_named():
    equal = "between copies that must be equal"
    assert compared(3, {}) == compared(3, {rank: ["e"] for rank in range(3)}) == ""
    assert compared(3, {1: ["b"]}) == f"param/b differs {equal}, on rank 1 on n0"
    assert compared(2, {1: ["f", "b"]}) == f"param/b, param/f differ {equal}, on rank 0 on n0, rank 1 on n0"
    many = f"param/a, param/b, param/c, param/d and 2 more differ {equal}"
    assert compared(3, {2: list("abcdef")}) == f"{many}, on rank 2 on n1"
    ranks = "rank 0 on n0, rank 1 on n0, rank 2 on n1, rank 3 on n1 and 2 more"
    assert compared(6, {rank: ["c"] for rank in range(3)}) == f"param/c differs {equal}, on {ranks}"
    assert compared(2, {}, lr=float("nan")) == "lr has no single value"


def memory(engine, name: str) -> torch.Tensor | None:
    """A number of this rank's part of a tensor; of a rank that has no part of it, None."""
    if name == "optimizer_step":
        return (engine._adamw.steps if isinstance(engine, FSDPEngine) else engine._steps()[-1].view(1))[-1:]
    boxes = engine.boxes()[name].boxes
    return boxes[0].tensor[(0,) * boxes[0].tensor.dim()] if boxes else None


def save_with_flips(config, cell: Cell, url: str, names: list[str]) -> tuple[dict[tuple[str, int], str], list[int]]:
    """Saves with the lowest bit of a number flipped, of each of ``names`` on each rank in turn; at last with nothing
    wrong. Returns what each save raised, by name and rank, and the steps committed."""
    with opened({}, url) as (world, run):
        engine, raised = engine_of(config, world), {}
        steps_of(engine, config, cell, world, range(2))
        attempt = Attempt(world.run_on_rank0(lambda: run.claim({}).number), run)
        checkpoints = Checkpointer(engine, attempt, world)
        for name in names:
            for rank in range(world.size):
                flipped = memory(engine, name) if world.rank == rank else None
                before = None if flipped is None else flipped.clone()
                if flipped is not None:
                    flipped.view(torch.int32).bitwise_xor_(1)
                try:
                    checkpoints.save(1 + len(raised), CURSOR)
                except CopiesDiffer as error:
                    raised[name, rank] = str(error)
                if flipped is not None:
                    flipped.copy_(before)
        assert checkpoints.save(1000, CURSOR) is None
        return raised, [entry.fields["step"] for entry in run.log.commits()]


@pytest.mark.parametrize(
    "engine,cell,caught",
    [
        ("fsdp", Cell(4, replicate=2), [SPLIT, REPLICATED]),
        ("fsdp", Cell(2, tensor=2), [REPLICATED]),
        ("fsdp", Cell(4, tensor=2, replicate=2), [SPLIT, REPLICATED]),
        ("zero3", Cell(4, tensor=2), [REPLICATED]),
    ],
    ids=str,
)
def test_a_flipped_bit_in_any_copy_is_caught(tmp_path, engine, cell, caught):
    """On all ranks alike, with its tensor and the ranks that hold it."""
    config = make_config(engine, layout__replicate=cell.replicate, layout__tensor=cell.tensor)
    names = [f"{kind}/{name}" for kind in KINDS for name in caught] + ["optimizer_step"]
    ranks = run_ranks(cell.world, save_with_flips, config, cell, str(tmp_path / "run"), names)
    assert all(rank == ranks[0] for rank in ranks)
    raised, committed = ranks[0]
    assert committed == [1000]
    assert set(raised) == {(name, rank) for name in names for rank in range(cell.world)}
    for (name, rank), message in raised.items():
        assert f"{name} differs between copies" in message and f"rank {rank} on {NODE}" in message, message


def save_with_a_flip_in_what_computes(config, url: str, hit: int, trained: bool) -> str:
    """What a save says after a bit has flipped in the range that rank ``hit`` computes with of a tensor."""
    with opened({}, url) as (world, run):
        engine = engine_of(config, world)
        steps_of(engine, config, Cell(world.size), world, range(1))
        checkpoints = Checkpointer(engine, Attempt(world.run_on_rank0(lambda: run.claim({}).number), run), world)
        assert checkpoints.save(1, CURSOR) is None
        shard = next(
            s for s in engine._shards.values() if s.param.requires_grad == trained and len(s.param.ds_shape) == 2
        )
        assert shard.param.ds_tensor.dtype == torch.bfloat16
        if world.rank == hit:
            shard.param.ds_tensor.view(torch.int16)[:1].bitwise_xor_(1 << 8)
        try:
            return str(checkpoints.save(2, CURSOR))
        except CopiesDiffer as error:
            return str(error)


@pytest.mark.parametrize("world,hit", [(1, 0), (3, 1)])
def test_a_flipped_bit_in_frozen_weights_is_caught(tmp_path, world, hit):
    """zero3 computes with bfloat16 of its own, which is in no commit, and is never written again if it is frozen."""
    config = make_config("zero3", layout__precision="bf16")
    config = config.model_copy(update={"trainable": ["blocks.*.attn.*"]})
    (said, *others) = run_ranks(world, save_with_a_flip_in_what_computes, config, str(tmp_path / "a"), hit, False)
    where = (
        f"differs between copies that must be equal, on rank 1 on {NODE}. " if world > 1 else "has no single value. "
    )
    assert said.startswith(f"step 2 is not committed, because the state is corrupt: frozen weights {where}")
    assert others == [said] * (world - 1)
    trained = run_ranks(world, save_with_a_flip_in_what_computes, config, str(tmp_path / "b"), hit, True)
    assert trained == ["None"] * world  # the next step writes it again


def test_of_three_copies_the_odd_one_is_named(tmp_path):
    config, name = make_config(layout__replicate=3), f"ema/{SPLIT}"
    (raised, _), *_ = run_ranks(3, save_with_flips, config, Cell(3, replicate=3), str(tmp_path / "run"), [name])
    assert [raised[name, rank].count("rank ") for rank in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("cell", [Cell(4, replicate=2), Cell(2, tensor=2), Cell(4, tensor=2, replicate=2)], ids=str)
def test_one_copy_saves(tmp_path, cell):
    """Every box is of the first replica, and what each rank of a tensor group has is of the group's first."""
    config = make_config(layout__replicate=cell.replicate, layout__tensor=cell.tensor)
    run_ranks(cell.world, save_with_flips, config, cell, str(tmp_path / "run"), [])
    (manifest,) = (json.loads(path.read_text()) for path in tmp_path.glob("run/steps/*/manifest.json"))
    files = defaultdict(set)
    for name, tensor in manifest["tensors"].items():
        files[name] |= {int(box["file"][len("rank-") : -len(".safetensors")]) for box in tensor["boxes"]}
    first = set(range(cell.world // cell.replicate))
    assert files[f"param/{SPLIT}"] == first
    assert files[f"ema/{REPLICATED}"] == {rank for rank in first if rank % cell.tensor == 0}


def train_flipped(config, name: str, step: int) -> int:
    """Trains; after a step the last rank's copy of a tensor is off in one number."""
    train_step = module.train_step

    def act(engine, batch, *rest):
        result = train_step(engine, batch, *rest)
        if batch.step == step and engine.copy.replica + engine.copy.tensor:
            memory(engine, name).view(torch.int32).bitwise_xor_(1 << 20)
        return result

    module.train_step = act
    return train(config)


@pytest.mark.parametrize("layout", [{"replicate": 2}, {"tensor": 2, "engine": "zero3"}], ids=str)
def test_training_ends_without_a_commit_and_the_next_attempt_repairs_it(tiny, layout):
    changes = {f"layout__{key}": value for key, value in layout.items()}
    changes |= {"train__steps": 8, "checkpoint__every_steps": 3}
    hit, undisturbed, name = tiny("hit", **changes), tiny("undisturbed", **changes), f"param/{REPLICATED}"
    assert run_ranks(2, train_flipped, hit, name, 4) == [RETRY, RETRY]
    run = Run.open(hit.run)
    assert [entry.fields["step"] for entry in run.log.commits()] == [3]
    assert sorted(path.name for path in Path(hit.run, "steps").iterdir()) == ["00000003.0001"]
    (attempt,) = status(run)["attempts"]
    assert attempt["code"] == RETRY
    assert attempt["why"].startswith("step 6 is not committed, because the state is corrupt: ")
    assert name in attempt["why"] and f"rank 0 on {NODE}, rank 1 on {NODE}" in attempt["why"]
    assert run_ranks(2, train, hit) == run_ranks(2, train, undisturbed) == [DONE, DONE]
    assert commit_bytes(hit.run) == commit_bytes(undisturbed.run)


def train_with_other_gradients(config) -> int:
    """Each rank's gradients are off by a little, as those of two GPUs are that add in another order."""
    for engine in (FSDPEngine, Zero3Engine):
        engine.backward = off_by_rank(engine.backward)
    return train(config)


def off_by_rank(backward):
    def act(self, loss, last):
        return backward(self, loss * (1 + 1e-6 * self.copy.tensor), last)

    return act


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_the_ranks_of_a_tensor_group_do_not_drift_apart(tiny, engine):
    """They all take the first rank's gradient of what each of them holds."""
    config = tiny(layout__tensor=2, layout__engine=engine, train__steps=3, checkpoint__every_steps=1)
    assert run_ranks(2, train_with_other_gradients, config) == [DONE, DONE]
