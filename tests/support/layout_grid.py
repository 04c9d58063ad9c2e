"""Training on synthetic steps, once in plain PyTorch in one process and once by an engine in any layout.

A step is twelve images, dealt to the data ranks and to packs by counting. What an engine did is read from its boxes, so
that nothing here knows how it cuts the state.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from data_sharding.plan.pack_layout import PackShape, lay_out
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.load import parse_config
from fitv2_scale.config.schema import Config
from fitv2_scale.model.counts import logical_shapes
from fitv2_scale.model.init import fill_initial
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.model.objective import pack_loss
from fitv2_scale.model.objectives import make_objective
from fitv2_scale.model.packed_batch import PackedBatch
from fitv2_scale.model.to_torch import packing_to_torch
from fitv2_scale.parallel.boxes import LogicalTensor
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.engine_spec import freeze
from fitv2_scale.parallel.world import World, join
from tests.support.ranks import run_ranks

STEPS, IMAGES, CLASSES, LONGEST = 20, 12, 5, 16


# All keys of the layout that compute the same in another way: results differ by rounding at most.
FASTER = {
    "layout__reshard_after_forward": "never", "layout__prefetch_blocks": 2, "layout__gate_and_value": "merged",
    "layout__kernels": "triton", "layout__pad_to_multiple_of": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A layout under test: ``world`` ranks, of which ``tensor`` work together and ``replicate`` copies are kept."""

    world: int
    tensor: int = 1
    replicate: int = 1
    packs: int = 1  # a rank and step
    room: int = 1  # how many times the tokens that the packs need

    def __str__(self) -> str:
        return f"world{self.world}-tensor{self.tensor}-replicate{self.replicate}-packs{self.packs}-room{self.room}"


@dataclass
class Trace:
    """What a training did: a loss and a gradient norm a step, and the state at the end, whole, by logical name.

    ``initial`` are the weights that the oracle began with.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    initial: dict[str, Tensor] = field(default_factory=dict)


def make_config(engine: str = "fsdp", **changes) -> Config:
    """Six heads, which groups of 2 and 3 divide, and a SwiGLU of 64 units, which 3 does not."""
    tree = {
        "run": "nowhere",
        "model": {"depth": 2, "hidden": 24, "heads": 6, "classes": CLASSES},
        "data": {"url": "nowhere"},
        "optimizer": {"lr": 5e-3, "warmup_steps": 10, "weight_decay": 0.01},
        "ema": {"decay": 0.9},
        "train": {"steps": STEPS},
        "layout": {"engine": engine, "precision": "fp32", "compile": False},
    }
    for dotted, value in changes.items():
        section, _, leaf = dotted.partition("__")
        if leaf:
            tree.setdefault(section, {})[leaf] = value
        else:
            tree[section] = value
    return parse_config(tree, "test")


def pack_of(step: int, images: list[int], slots: int, room: int) -> PackedBatch:
    """The images of a step by their number, in a pack with ``room`` times the tokens that the fullest pack can need."""
    drawn = [np.random.default_rng((step, image)) for image in images]
    sizes = [tuple(rng.integers(1, 5, 2).tolist()) for rng in drawn]
    tokens = room * slots * LONGEST
    layout = lay_out(sizes, PackShape(tokens, slots + room * slots, LONGEST))
    latents_TC, at = np.zeros((tokens, 16), np.float32), 0
    for rng, (rows, columns) in zip(drawn, sizes, strict=True):
        latents_TC[at : at + rows * columns] = rng.standard_normal((rows * columns, 16))
        at += rows * columns
    label_I, weight_I, id_I = (np.zeros(slots + room * slots, t) for t in (np.int64, np.float32, np.int64))
    label_I[: len(images)] = [rng.integers(CLASSES) for rng in drawn]
    weight_I[: len(images)] = 1 / IMAGES
    id_I[: len(images)] = np.array(images) + IMAGES * step
    return PackedBatch(
        latents_TC=torch.from_numpy(latents_TC),
        packing=packing_to_torch(layout),
        label_I=torch.from_numpy(label_I),
        weight_I=torch.from_numpy(weight_I),
        sample_id_I=torch.from_numpy(id_I),
        epoch_I=torch.zeros(len(id_I), dtype=torch.int64),
    )


def packs_of(step: int, rank: int, ranks: int, packs: int, room: int) -> list[PackedBatch]:
    """A data rank's packs of a step."""
    groups, slots = ranks * packs, -(-IMAGES // (ranks * packs))
    return [pack_of(step, list(range(rank * packs + k, IMAGES, groups)), slots, room) for k in range(packs)]


def loss_of(network: Callable[..., Tensor], pack: PackedBatch, config: Config) -> Tensor:
    """The pack's part of a step's loss."""
    return pack_loss(make_objective(config, pack.latents_TC.device), network, pack)


def alone(config: Config) -> Trace:
    """The oracle: one process, plain modules, PyTorch's own clipping and AdamW, nothing of fitv2_scale.parallel's."""
    network, trace = DiffusionTransformer(config.model), Trace()
    freeze(network, config.trainable)
    params = dict(network.named_parameters())
    with torch.no_grad():
        for name, param in params.items():
            fill_initial(param, name, param.shape, (0,) * param.dim(), config.seed, config.model)
    trace.initial = {n: p.detach().clone() for n, p in params.items()}
    ema, trained = {n: p.detach().clone() for n, p in params.items()}, [p for p in params.values() if p.requires_grad]
    o = config.optimizer
    adamw = torch.optim.AdamW(
        trained, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, foreach=False, fused=False
    )
    for step in range(STEPS):
        loss = loss_of(network, pack_of(step, list(range(IMAGES)), IMAGES, 1), config)
        loss.backward()
        trace.losses.append(loss.item())
        trace.norms.append(torch.nn.utils.clip_grad_norm_(trained, o.max_norm).item())
        adamw.param_groups[0]["lr"] = o.lr_at(step)
        adamw.step()
        adamw.zero_grad()
        for name, param in params.items():
            if param.requires_grad:
                ema[name].lerp_(param.detach(), 1 - config.ema.decay)
    trace.state = {f"param/{n}": p.detach() for n, p in params.items()} | {f"ema/{n}": e for n, e in ema.items()}
    return trace


def steps_of(engine, config: Config, cell: Cell, world: World, steps: Iterable[int] = range(STEPS)) -> Trace:
    """Trains ``engine`` on ``steps``. The losses are summed over the data ranks; the state is not read."""
    layout, trace = Layout.of(world.size, cell.replicate, cell.tensor), Trace()
    rank = layout.data_rank(world.rank)
    for step in steps:
        total = torch.zeros(())
        packs = packs_of(step, rank, layout.data_parallel, cell.packs, cell.room)
        for k, pack in enumerate(packs):
            loss = loss_of(engine.network, pack, config)
            engine.backward(loss, last=k == len(packs) - 1)
            total += loss.detach()
        result = engine.step(config.optimizer.lr_at(step), config.optimizer.max_norm)
        trace.losses.append(
            world.all_reduce_sum(total if layout.tensor_rank(world.rank) == 0 else torch.zeros(())).item()
        )
        trace.norms.append(float(result.norm))
        assert not result.skipped
    return trace


Boxes = dict[str, list[tuple[tuple[int, ...], np.ndarray]]]  # (offset, values) by logical name


def train_cell(config: Config, cell: Cell) -> tuple[Trace, Boxes]:
    """On each rank: what it did, and what it holds at the end."""
    with join() as world:
        engine = make_engine(config, Layout.of(world.size, cell.replicate, cell.tensor), world)
        trace = steps_of(engine, config, cell, world)
        return trace, values_of(engine.boxes())


def values_of(boxes: dict[str, LogicalTensor]) -> Boxes:
    return {name: [(b.offset, b.tensor.cpu().numpy()) for b in logical.boxes] for name, logical in boxes.items()}


def together(config: Config, ranks: list[tuple[Trace, Boxes]]) -> Trace:
    """One trace of all ranks', after checking that their boxes cover every tensor and that copies are bit-equal."""
    trace, parts = ranks[0][0], defaultdict(list)
    for other, boxes in ranks:
        assert (other.losses, other.norms) == (trace.losses, trace.norms)
        for name, held in boxes.items():
            parts[name] += held
    shapes = logical_shapes(config.model)
    for name in (f"{kind}/{n}" for kind in ("param", "ema") for n in shapes):
        whole = np.full(shapes[name.split("/", 1)[1]], np.nan, np.float32)
        for offset, values in parts[name]:
            part = whole[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))]
            assert (np.isnan(part) | (part == values)).all(), f"two ranks hold different values of {name}"
            part[:] = values
        assert not np.isnan(whole).any(), f"no rank holds all of {name}"
        trace.state[name] = torch.from_numpy(whole)
    return trace


@cache
def oracle(changes: tuple) -> Trace:
    return alone(make_config(**dict(changes)))


def run_cell(engine: str, cell: Cell, **changes) -> Trace:
    config = make_config(engine, layout__replicate=cell.replicate, layout__tensor=cell.tensor, **changes)
    return together(config, run_ranks(cell.world, train_cell, config, cell))


def assert_the_same(found: Trace, expected: Trace) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    for name, value in expected.state.items():
        off = (found.state[name] - value).abs().max()
        assert off <= 1e-5, f"{name} is off by {off}"


def engine_of(config: Config, world: World) -> Engine:
    return make_engine(config, Layout.of(world.size, config.layout.replicate, config.layout.tensor), world)
