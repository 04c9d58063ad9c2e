"""Any layout reads what any other has saved, bit for bit, and training continues from there as it would in one process.

The state is random, each tensor by its name, so that what a rank has to hold is known without asking anything that is
tested. The label table has 1001 rows, which no number of ranks here divides.
"""

import zlib
from collections.abc import Iterable
from itertools import permutations

import numpy as np
import pytest
import torch

from fitv2_scale.checkpoint.checkpointer import Checkpointer
from fitv2_scale.checkpoint.restore import restore
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.world import World, join
from fitv2_scale.run.run import Attempt, Run
from tests.support.checkpoint_state import CURSOR
from tests.support.layout_grid import Cell, make_config, steps_of
from tests.support.ranks import run_ranks

Where = tuple[str, Cell]  # engine and layout
CELLS = [Cell(w, t) for w in (1, 2, 3, 4, 6) for t in (1, 2, 3) if w % t == 0]
GRID: list[Where] = [(engine, cell) for engine in ("fsdp", "zero3") for cell in CELLS]
EVERYWHERE = [*GRID, ("fsdp", Cell(4, 1, 2)), ("fsdp", Cell(4, 2, 2))]  # copies are kept, too
ALONE: Where = ("fsdp", Cell(1))
DONE, STEPS = 7, range(7, 17)  # steps before the commit, and those that follow


def covering(layouts: list[Where]) -> list[tuple[Where, Where]]:
    """Ordered pairs: each layout with itself, as source and as target; each two world sizes, and each two of (engine,
    tensor degree), in either order."""
    pairs, covered = [(where, where) for where in layouts], set[tuple]()
    for source, target in permutations(layouts, 2):
        (e, a), (f, b) = source, target
        shows = {(source, "reads"), ("writes", target), (a.world, b.world), ((e, a.tensor), (f, b.tensor))}
        if shows - covered:
            pairs.append((source, target))
            covered |= shows
    return pairs


def name_of(where: Where) -> str:
    engine, cell = where
    return f"{engine}-{cell.world}x{cell.tensor}" + (f"-{cell.replicate}copies" if cell.replicate > 1 else "")


THREE, GROUPS = ("fsdp", Cell(3)), ("zero3", Cell(4, 2))
SHORT = [
    *((THREE, to) for to in (THREE, ("zero3", Cell(2, 2)), ("zero3", Cell(4)))),
    *((GROUPS, to) for to in (GROUPS, ("fsdp", Cell(3, 3)), ALONE)),
]
FULL = [pair for pair in covering(EVERYWHERE) if pair not in SHORT]


def pair(source: Where, target: Where, *marks: pytest.MarkDecorator):
    return pytest.param(source, target, id=f"{name_of(source)}-to-{name_of(target)}", marks=marks)


def config_of(where: Where) -> Config:
    engine, cell = where
    changes = {"layout__tensor": cell.tensor, "layout__replicate": cell.replicate}
    return make_config(engine, model__classes=1000, model__qk_norm="l2_scale", **changes)


def expected(name: str, shape: Iterable[int]) -> torch.Tensor:
    """The logical tensor of that name: weights of about the usual size, second moments that are positive."""
    values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    scale = {"param": 0.2, "ema": 0.2, "exp_avg": 1e-3, "exp_avg_sq": 1e-3}[name.split("/")[0]]
    return (values * scale).square() if name.startswith("exp_avg_sq/") else values * scale


def parts(engine: Engine) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, what this rank holds, what it should hold) of each box."""
    for name, logical in engine.boxes().items():
        whole = expected(name, logical.shape)
        for box in logical.boxes:
            there = tuple(slice(o, o + n) for o, n in zip(box.offset, box.tensor.shape, strict=True))
            yield name, box.tensor, whole[there]


def engine_of(where: Where, world: World) -> Engine:
    return make_engine(config_of(where), Layout.of(world.size, where[1].replicate, where[1].tensor), world)


def next_losses(engine: Engine, where: Where, world: World) -> list[float]:
    return steps_of(engine, config_of(where), where[1], world, STEPS).losses


def save(where: Where, url: str) -> list[float]:
    """Commits the random state to a new run; returns the losses of the steps that follow."""
    with join() as world:
        engine = engine_of(where, world)
        for _, held, values in parts(engine):
            held.copy_(values)
        engine.load_scalars({"optimizer_step": float(DONE)})
        engine.loaded()
        world.run_on_rank0(lambda: Run.open_or_create(url, {}, {}, None) and None)
        run = Run.open(url)
        attempt = Attempt(world.run_on_rank0(lambda: run.claim({}).number), run)
        assert Checkpointer(engine, attempt, world).save(DONE, CURSOR) is None
        return next_losses(engine, where, world)


def load(where: Where, url: str) -> tuple[list[str], dict[str, float], list[float]]:
    """The tensors that this rank does not hold as they were saved, the scalars, and the losses of the next steps."""
    with join() as world:
        engine, run = engine_of(where, world), Run.open(url)
        for _, held, _ in parts(engine):
            held.fill_(float("nan"))  # what a load leaves out
        restored = restore(engine, run, world)
        assert (restored.step, restored.cursor, restored.quarantined) == (DONE, CURSOR, [])
        wrong = [name for name, held, values in parts(engine) if not torch.equal(held, values)]
        return wrong, engine.scalars(), next_losses(engine, where, world)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved(where)``: URL of a run with a commit by that layout, and the losses that followed there."""
    folder, done = tmp_path_factory.mktemp("saved"), {}

    def made(where: Where) -> tuple[str, list[float]]:
        if where not in done:
            url = str(folder / name_of(where))
            done[where] = url, run_ranks(where[1].world, save, where, url)[0]
        return done[where]

    return made


@pytest.mark.parametrize("source,target", [*(pair(*p) for p in SHORT), *(pair(*p, pytest.mark.long) for p in FULL)])
def test_any_layout_continues_any_others_commit(saved, source, target):
    url, losses = saved(source)
    for wrong, scalars, found in run_ranks(target[1].world, load, target, url):
        assert wrong == [] and scalars == {"optimizer_step": DONE}
        assert found == pytest.approx(saved(ALONE)[1], rel=1e-6, abs=0)
        assert source != target or found == losses
    assert np.ptp(losses) > 0.01 * losses[0]  # the weights matter, and they move


def test_the_pairs_cover_the_grid():
    pairs = {(a, b) for a, b in [*SHORT, *FULL] if a in GRID and b in GRID}
    assert len(pairs) >= 24 and all((where, where) in pairs for where in GRID)
    worlds = {(a.world, b.world) for (_, a), (_, b) in pairs}
    groups = {((e, a.tensor), (f, b.tensor)) for (e, a), (f, b) in pairs}
    assert (len(worlds), len(groups)) == (25, 36)
