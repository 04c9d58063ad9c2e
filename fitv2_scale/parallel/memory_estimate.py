"""The memory that each rank needs, by layout: computed without processes and without weights.

The size of the state is exact. The peak on a GPU is an estimate: the state, the activations that a pack's forward pass
saves for its backward pass, and the temporaries of one block.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial

from fitv2_scale.config.layout import Checkpointing, Layout, Precision, Reshard
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.counts import INTO_MLP, logical_parameters, trained_names
from fitv2_scale.parallel.tensor_pieces import TensorGroup, local_pieces

ZERO3_BUCKET = 50_000_000  # elements that DeepSpeed reduces at once, and gathers ahead of their use
_FLOAT32 = 4
_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp8": 2}  # of a number that the network computes


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank's state: what it always holds, and what a step adds temporarily."""

    weights: int  # including the engine's padding
    moments: int  # AdamW's two, and its counts of steps
    ema: int
    gradients: int  # from the last backward pass of a step to its end; zero3 keeps them
    accumulated: int  # unsharded gradients, between the packs of a step; none if a step is one pack

    @property
    def held(self) -> int:
        return self.weights + self.moments + self.ema


def state_bytes(
    engine: str, model: ModelConfig, layout: Layout, trainable: list[str], precision: Precision, rank: int
) -> StateBytes:
    """The state of ``rank`` with ``engine``. Raises UserError if ``trainable`` matches no tensor."""
    if engine == "fsdp":
        return _fsdp(model, layout, trainable, rank)
    return _zero3(model, layout, trainable, precision)


def _fsdp(model: ModelConfig, layout: Layout, trainable: list[str], rank: int) -> StateBytes:
    """FSDP2 shards the rows of each tensor, and pads every rank's shard to the size of the largest.

    Gradients are in one padded buffer per block; moments and EMA, which are this project's own, are not padded.
    """
    shard = layout.data_rank(rank) % layout.shard
    whole, padded, own = {}, {}, {}
    for name, shape in _local_shapes(model, layout).items():
        rows, width = shape[0], math.prod(shape[1:])
        most = -(-rows // layout.shard)
        whole[name], padded[name] = rows * width, most * width
        own[name] = min(most, max(0, rows - shard * most)) * width
    trained = trained_names(logical_parameters(model), trainable)
    total = partial(_total, trained)
    return StateBytes(
        weights=_FLOAT32 * sum(padded.values()),
        moments=_FLOAT32 * (2 * total(own) + len(trained)),
        ema=_FLOAT32 * sum(own.values()),
        gradients=_FLOAT32 * total(padded),
        accumulated=_FLOAT32 * total(whole),
    )


def _zero3(model: ModelConfig, layout: Layout, trainable: list[str], precision: Precision) -> StateBytes:
    """DeepSpeed shards the elements of each tensor, padded to the same number on every rank: all ranks hold the same.

    It computes with a copy in ``precision``. Its gradient buffer and its reduction bucket are permanent, and tensors no
    larger than the largest vector stay gathered. (AdamW counts steps once per 100 M elements of a rank; four bytes
    stand here for all counts.)
    """
    ranks, shapes = layout.data_parallel, _local_shapes(model, layout)
    part = {name: -(-math.prod(shape) // ranks) for name, shape in shapes.items()}
    largest_vector = max(shape[0] for shape in shapes.values() if len(shape) == 1)
    gathered = sum(ranks * part[n] for n, shape in shapes.items() if math.prod(shape) <= largest_vector)
    all_parts, trained_parts = sum(part.values()), _total(trained_names(shapes, trainable), part)
    # Frozen tensors have no master of their own where the network computes in float32.
    masters = all_parts if precision == "bf16" else trained_parts
    computed = _BYTES[precision] * (all_parts + (gathered if ranks > 1 else 0))
    return StateBytes(
        weights=computed + _FLOAT32 * masters,
        moments=_FLOAT32 * (2 * trained_parts + 1),
        ema=_FLOAT32 * all_parts,
        gradients=_FLOAT32 * (trained_parts + ZERO3_BUCKET),
        accumulated=0,
    )


def _total(names: Collection[str], numel: dict[str, int]) -> int:
    return sum(numel[name] for name in names)


def _local_shapes(model: ModelConfig, layout: Layout) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor on the ranks of a tensor group: that of the first rank, which has the largest part."""
    first = TensorGroup(0, layout.tensor)
    shapes = {}
    for name, parameter in logical_parameters(model).items():
        pieces = local_pieces(parameter, first)
        shapes[name] = tuple(max(p.local[d] + p.shape[d] for p in pieces) for d in range(len(parameter.shape)))
    return shapes


@dataclass(frozen=True)
class Compute:
    """How a rank computes: the settings that the memory of a pack depends on."""

    checkpointing: Checkpointing
    compiled: bool
    precision: Precision
    packs: int  # a step
    tokens: int  # of the largest pack
    reshard_after_forward: Reshard = "always"
    prefetch_blocks: int = 1


def saved_bytes(model: ModelConfig, layout: Layout, compute: Compute) -> int:
    """Bytes that the forward pass of a pack saves for the backward pass in all blocks, with the varlen kernel.

    In elements per token, with width D, MLP width M, and D' and M' a tensor rank's parts of them:
    ``full`` keeps the block's input, D; ``selective`` also the products: qkv 3 D', attention D', its projection D, gate
    and value 2 M' (one M' without a gate), the MLP's result D. ``none`` also keeps the inputs of the products: two
    modulated inputs 2 D, q and k as attention takes them 2 D', the activation's M'. That is what the compiler's
    partitioner keeps; without compilation, modulation 6 D, the parts of both modulated norms 4 D, the second residual
    D and SiLU M' are added.
    """
    d, d_local, m_local = model.hidden, model.hidden // layout.tensor, -(-model.mlp_hidden // layout.tensor)
    into_mlp = len(INTO_MLP[model.mlp])
    numbers, statistics = d, 0
    if compute.checkpointing != "full":
        numbers += 2 * d + 4 * d_local + into_mlp * m_local
        statistics = model.heads // layout.tensor  # the softmax's log-sum-exp, float32
    if compute.checkpointing == "none":
        changes_qk = model.position == "rope" or model.qk_norm != "none"
        numbers += 2 * d + (2 * d_local if changes_qk else 0) + m_local
        if not compute.compiled:
            numbers += 11 * d + (into_mlp - 1) * m_local
    return model.depth * compute.tokens * (numbers * _BYTES[compute.precision] + statistics * _FLOAT32)


def unsharded(layout: Layout, state: StateBytes) -> int:
    """Elements of all weights that a rank of the ``fsdp`` engine gathers: the shards of all ranks, with padding."""
    return state.weights // _FLOAT32 * layout.shard


def cuda_peak(model: ModelConfig, layout: Layout, state: StateBytes, compute: Compute) -> int:
    """The most bytes that the ``fsdp`` engine allocates on a GPU at once, in a step: an estimate.

    Saved activations peak when the last pack's backward pass begins, and are freed as gradients appear. Added to them
    is what one block needs: what it recomputes, the gradients inside it (3 M + 2 D per token), its weights three times
    (in use, prefetched, and in the buffer of the prefetch; once more for each other block that is prefetched), their
    gradients, and two reduction buffers. What is outside of the blocks stays gathered, and keeps 6 D per token for the
    last layer. If weights are gathered once a step, all of them are there instead.
    """
    bytes_, whole = _BYTES[compute.precision], _local_shapes(model, layout)
    saved = saved_bytes(model, layout, compute)
    everything = saved_bytes(model, layout, replace(compute, checkpointing="none"))
    inside = compute.tokens * (3 * -(-model.mlp_hidden // layout.tensor) + 2 * model.hidden) * bytes_
    again = (everything - saved) // model.depth
    in_blocks = sum(math.prod(shape) for name, shape in whole.items() if name.startswith("blocks."))
    outside = sum(math.prod(shape) for shape in whole.values()) - in_blocks
    block = in_blocks // model.depth
    few = outside + (2 + min(compute.prefetch_blocks, model.depth - 1)) * block
    weights = {"always": few, "never": unsharded(layout, state)}[compute.reshard_after_forward]
    gathered = (weights + block) * bytes_ + 2 * block * _FLOAT32
    last_layer = 6 * model.hidden * compute.tokens * bytes_
    accumulated = state.accumulated if compute.packs > 1 else 0
    passing = max(accumulated + saved + last_layer, state.gradients)
    return state.held + passing + inside + again + gathered
