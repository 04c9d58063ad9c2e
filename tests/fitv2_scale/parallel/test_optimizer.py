"""The optimizer step on local shards against PyTorch's own, in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fitv2_scale.bench.step_data import open_steps
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.load import load_config
from fitv2_scale.config.sections import OptimizerConfig
from fitv2_scale.data import Data
from fitv2_scale.model.objectives import make_objective
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.optimizer import AdamW, global_norm, step_result, update_ema
from fitv2_scale.parallel.world import join
from fitv2_scale.train.step import poison_if_not_finite, train_step
from tests.support.ranks import run_ranks

CONFIG = OptimizerConfig(beta2=0.99, weight_decay=0.01)
SHAPES = {"matrix": (7, 5), "vector": (11,), "empty": (0, 5)}
DECAY, MAX_NORM = 0.9, 5.0
ONE_IMAGE = ["model.depth=2", "model.hidden=32", "model.heads=2", "model.classes=1000", "data.url=preset:imagenet256"]
ONE_IMAGE += ["batch.images=1", "layout.max_tokens=256", "layout.precision=bf16"]
BAD = {3: float("nan"), 4: float("inf"), 7: float("-inf")}  # what one gradient element is, by step


def gradients(step: int) -> dict[str, torch.Tensor]:
    """Some with a norm below MAX_NORM, some above; float64."""
    generator = torch.Generator().manual_seed(step)
    return {n: torch.randn(s, generator=generator).double() * (step % 3) for n, s in SHAPES.items()}


def start() -> dict[str, torch.Tensor]:
    return {n: w + 1 for n, w in gradients(100).items()}


def oracle(steps: list[int]) -> tuple[dict, dict, list[float]]:
    """Weights, EMA and norms by torch.optim.AdamW and clip_grad_norm_, in float64."""
    params = {n: torch.nn.Parameter(w) for n, w in start().items()}
    ema, norms = {n: p.detach().clone() for n, p in params.items()}, []
    betas, eps, decay = (CONFIG.beta1, CONFIG.beta2), CONFIG.eps, CONFIG.weight_decay
    adamw = torch.optim.AdamW(params.values(), betas=betas, eps=eps, weight_decay=decay, foreach=False)
    for step in steps:
        for name, grad in gradients(step).items():
            params[name].grad = grad
        norms.append(torch.nn.utils.clip_grad_norm_(params.values(), MAX_NORM).item())
        adamw.param_groups[0]["lr"] = 0.01 * (step + 1)
        adamw.step()
        for name, p in params.items():
            ema[name].lerp_(p.detach(), 1 - DECAY)
    return {n: p.detach() for n, p in params.items()}, ema, norms


on_any_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


class Ours:
    def __init__(self, device: str):
        self.device = device
        self.weights = {n: w.float().to(device) for n, w in start().items()}
        self.ema = {n: w.clone() for n, w in self.weights.items()}
        self.adamw = AdamW(self.weights, CONFIG)

    def step(self, step: int, bad: float | None = None) -> tuple[float, float]:
        """(norm, skipped)"""
        grads = {n: g.float().to(self.device) for n, g in gradients(step).items()}
        if bad is not None:
            grads["vector"][4] = bad
        weights = list(self.weights.values())
        result = step_result(global_norm(list(grads.values()), [], None, None))
        self.adamw.step(weights, list(grads.values()), result, 0.01 * (step + 1), MAX_NORM)
        update_ema(list(self.ema.values()), weights, DECAY, result.skipped)
        return result.norm.item(), result.skipped.item()

    def state(self) -> list[torch.Tensor]:
        parts = (self.weights, self.ema, self.adamw.exp_avg, self.adamw.exp_avg_sq)
        return [self.adamw.steps.clone(), *(t.clone() for part in parts for t in part.values())]


@on_any_device
def test_it_is_adamw_with_clipping_and_an_ema(device):
    weights, ema, norms = oracle(list(range(12)))
    ours = Ours(device)
    found = [ours.step(step) for step in range(12)]
    assert min(norms) < MAX_NORM < max(norms)  # both kinds were there
    assert [skipped for _, skipped in found] == [0.0] * 12
    assert [norm for norm, _ in found] == pytest.approx(norms, rel=1e-6)
    for name in SHAPES:
        torch.testing.assert_close(ours.weights[name].cpu().double(), weights[name], rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(ours.ema[name].cpu().double(), ema[name], rtol=1e-6, atol=2e-6)


@on_any_device
def test_a_skipped_step_never_was(device):
    """Nothing moves by a bit, and nothing is counted: later steps are those of a training without the bad ones."""
    ours, without = Ours(device), Ours(device)
    for step in range(12):
        before = ours.state()
        norm, skipped = ours.step(step, BAD.get(step))
        assert skipped == (step in BAD)
        if step in BAD:
            assert norm != norm or norm == float("inf")
            assert all(map(torch.equal, ours.state(), before))
        else:
            without.step(step)
    assert all(map(torch.equal, ours.state(), without.state()))
    assert ours.adamw.steps.tolist() == [12 - len(BAD)] * len(SHAPES)


def test_a_loss_that_is_not_finite_has_no_finite_gradient():
    x = torch.linspace(-1, 1, 7).requires_grad_()
    (plain,) = torch.autograd.grad(x.square().sum(), x)
    (told,) = torch.autograd.grad(poison_if_not_finite(x.square().sum()), x)
    assert torch.equal(plain, told)
    for bad in (float("inf"), float("-inf"), float("nan")):
        (told,) = torch.autograd.grad(poison_if_not_finite(x.square().sum() + bad), x)
        assert told.isnan().all()


SPLIT, COPY = (6, 4), (5, 3)  # of a tensor that a tensor group shares out, and of one of which each rank has a copy


def shard_norms() -> list[float]:
    """2 shard ranks x 2 tensor ranks: the norm of a gradient, then with one bad element on one rank after another."""
    with join() as world:
        shard_rank, tensor_rank = divmod(world.rank, 2)
        shards = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        tensors = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        split, copy = whole_gradient()
        mine = split.tensor_split(2, 1)[tensor_rank].tensor_split(2)[shard_rank].float()
        rows = copy.tensor_split([5])[shard_rank].float()  # all rows on one rank, none on the other
        norms = []
        for bad in (None, *range(world.size)):
            held = mine.clone()
            if bad == world.rank:
                held[0, 0] = float("nan")
            norm = global_norm([held], [rows], shards[tensor_rank], tensors[shard_rank])
            norms.append(norm.item())
        return norms


def whole_gradient() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(s, generator=generator).double() for s in (SPLIT, COPY))


def test_the_norm_is_the_same_everywhere_and_counts_copies_once():
    split, copy = whole_gradient()
    expected = torch.cat([split.flatten(), copy.flatten()]).norm().item()
    ranks = run_ranks(4, shard_norms)
    assert ranks[0][0] == pytest.approx(expected, rel=1e-6)
    assert len({norms[0] for norms in ranks}) == 1
    assert all(norm != norm for norms in ranks for norm in norms[1:])


class NothingReadBack(TorchDispatchMode):
    """Raises where the host would need to know a value: on CUDA, where it would wait."""

    aten = torch.ops.aten
    reads = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in (self.aten.index, self.aten.index_put, self.aten._index_put_impl_)
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if by_mask else []
        if func.overloadpacket in self.reads or masks:
            raise AssertionError(f"{func} reads a value back")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packs", [1, 2])
def test_a_step_reads_nothing_back(tiny, packs):
    config = tiny(train__audit=False, layout__max_tokens=256 // packs, layout__checkpointing="full")
    assert run_ranks(1, steps_without_waiting, config) == [packs * 3]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_never_waits_for_the_device(compiled):
    config = load_config("configs/demo.yaml", [*ONE_IMAGE, f"layout.compile={compiled}"])
    assert run_ranks(1, steps_without_waiting, config) == [3]


def steps_without_waiting(config) -> int:
    """Packs trained on after a warm-up, with any synchronisation an error."""
    packs = 0
    with join() as world:
        layout = Layout.of(world.size, config.layout.replicate, config.layout.tensor)
        data = Data.open(config, layout.nodes(world.hosts))
        engine, objective = make_engine(config, layout, world), make_objective(config, world.device)
        with open_steps(config, data, world.rank, 6) as batches:
            for batch in islice(batches, 3):
                train_step(engine, batch, objective, config, world.device)
            with refusing_to_wait(world.device):
                for batch in batches:
                    train_step(engine, batch, objective, config, world.device)
                    packs += len(batch.packs)
    return packs


@contextmanager
def refusing_to_wait(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        with NothingReadBack():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
