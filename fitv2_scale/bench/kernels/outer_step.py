"""Counts what a training step does outside of its blocks: operations, bytes and collectives of one rank of any number,
on a process group that exchanges nothing and on tensors without values."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_sharding.format.stored_array import DTYPE
from data_sharding.plan.pack_layout import PackShape, lay_out
from data_sharding.stream.batch import Pack, StepBatch
from fitv2_scale.bench.kernels.counts import Operation, OuterStep, Phase
from fitv2_scale.config.schema import Config
from fitv2_scale.model.objectives import make_objective
from fitv2_scale.model.packed_batch import Packing
from fitv2_scale.parallel import fsdp
from fitv2_scale.parallel.boxes import Box
from fitv2_scale.parallel.engine import StepResult
from fitv2_scale.parallel.engine_spec import EngineSpec
from fitv2_scale.parallel.fsdp import FSDPEngine
from fitv2_scale.parallel.mesh import make_groups
from fitv2_scale.train.step import train_step

_COLLECTIVES = ("c10d", "_c10d_functional")
_OVERWRITE = ("copy_", "_foreach_copy_", "fill_", "zero_")
_NOT_OF_TENSORS = ("prim", "profiler")
_MAKE_NOTHING = ("empty", "new_empty", "detach", "lift_fresh", "alias", "view", "expand", "is_same_size")


def count_outer_step(config: Config, ranks: int, nodes: int, shape: PackShape, packs: int) -> OuterStep:
    """A step of rank 0 of ``ranks``, of ``packs`` packs of ``shape``; to be called once in a process of its own."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    groups = make_groups(config.layout.over(ranks, nodes), "cpu")
    with (
        FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False),
        patch.object(fsdp, "compute_local_shape_and_global_offset", _on_real_tensors),
        patch.object(Packing, "knows_lengths", False),  # as on a GPU
    ):
        engine = _Engine(_Unfilled(**vars(EngineSpec.of(config, on_cuda=False))), groups)
        for block in engine.network.blocks:
            block.forward = _WithoutWork(block)
        batch, device = _batch(shape, packs, config.model.token_channels), torch.device("cpu")
        objective = make_objective(config, device)
        engine.network.register_forward_pre_hook(engine.forward, prepend=True)  # before FSDP gathers
        with _Counting(engine):
            train_step(engine, batch, objective, config, device)  # the first one makes what later ones find
        engine.phase = "data"
        with _Counting(engine) as counting:
            train_step(engine, batch, objective, config, device)
        moments = [tensor for name, tensor in engine.boxes().items() if name.startswith("exp_avg/")]
    trained = sum(box.tensor.numel() for tensor in moments for box in tensor.boxes)
    return OuterStep(tuple(counting.operations()), trained)


def _on_real_tensors(*args: Any) -> Any:
    """Where a shard lies is computed with small tensors that are read."""
    with unset_fake_temporarily():
        return compute_local_shape_and_global_offset(*args)


class _Engine(FSDPEngine):
    """Knows which part of a step it is in."""

    phase: Phase = "data"

    def forward(self, *_: Any) -> None:
        self.phase = "forward"

    def backward(self, loss: Tensor, last: bool) -> None:
        self.phase = "backward"
        super().backward(loss, last)
        self.phase = "data"

    def step(self, lr: float, max_norm: float) -> StepResult:
        self.phase = "step"
        return super().step(lr, max_norm)


class _Unfilled(EngineSpec):
    def fill(self, name: str, boxes: Iterable[Box]) -> None:
        """Leaves the tensor without values, since it has none."""


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, c_ID: Tensor, shared_I6D: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.inputs = (x_TD, c_ID, shared_I6D, *weights)
        return torch.empty_like(x_TD)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        return tuple(None if value is None else torch.empty_like(value) for value in ctx.inputs)


class _WithoutWork:
    """Takes the place of a block's forward: results and gradients of its shapes, and no operation."""

    def __init__(self, block: nn.Module):
        self._block = block

    def __call__(self, x_TD: Tensor, c_ID: Tensor, shared_I6D: Tensor | None, *_: Any) -> Tensor:
        return _Block.apply(x_TD, c_ID, shared_I6D, *self._block.parameters())


class _Counting(TorchDispatchMode):
    def __init__(self, engine: _Engine):
        super().__init__()
        self._engine = engine
        self._found: Counter[tuple[Phase, str, int, str, bool]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does with this rank's part comes here again
        kwargs = kwargs or {}
        # What only changes its arguments changes nothing here; torch has no fake form of the fused SGD.
        only_changes = func.namespace == "aten" and not func._schema.returns
        out = None if only_changes else func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace in _COLLECTIVES:
            largest = max(_tensors((args, kwargs)), key=_bytes)
            self._found[self._engine.phase, name, _bytes(largest), str(largest.dtype).removeprefix("torch."), True] += 1
        elif not (func.namespace in _NOT_OF_TENSORS or func.is_view or name.startswith(_MAKE_NOTHING)):
            self._found[self._engine.phase, name, _moved(func, args, kwargs, out), "", False] += 1
        return out

    def operations(self) -> list[Operation]:
        return [Operation(*key, count) for key, count in self._found.items()]


def _moved(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that an operation reads and writes."""
    name, arguments = func.overloadpacket.__name__, func._schema.arguments
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    if name == "all_gather_copy_in":  # into a part of the buffer that it takes and returns
        return 2 * sum(map(_bytes, _tensors(given["all_gather_inputs"])))
    changed = {argument.name for argument in arguments if argument.is_write}
    if given.get("grad_scale") is None:
        changed -= {"grads"}  # fused optimizers write them back only if they scale them
    overwritten = changed if name in _OVERWRITE else changed & {"out"}
    sizes = {name: sum(map(_bytes, _tensors(value))) for name, value in given.items()}
    read = sum(size for name, size in sizes.items() if name not in overwritten)
    return read + (sum(sizes[name] for name in changed & sizes.keys()) if changed else sum(map(_bytes, _tensors(out))))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Of the memory that it refers to: an expanded dimension counts once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


def _batch(shape: PackShape, packs: int, channels: int) -> StepBatch:
    images = shape.tokens // shape.max_seqlen or 1
    length = min(shape.max_seqlen, shape.tokens)
    pack = Pack(
        layout=lay_out([(1, length)] * images, shape),
        latents=np.zeros((shape.tokens, channels), DTYPE),
        label=np.zeros(shape.images, np.int64),
        weight=np.zeros(shape.images, np.float32),
        sample_id=np.zeros(shape.images, np.int64),
        epoch=np.zeros(shape.images, np.int64),
    )
    lengths = np.full(images * packs, length)
    return StepBatch(0, [pack] * packs, 0, 0, lengths, shape.tokens * packs, 0, 0.0, 0)
