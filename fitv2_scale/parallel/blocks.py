"""Activation checkpointing and compilation of each block, before an engine shards the network.

Only a block's forward is replaced: its module, and so every public name, stays the same, and the engine's hooks (which
gather the block's weights) stay outside of what is compiled or recomputed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fitv2_scale.config.layout import Checkpointing
from fitv2_scale.model.attention import has_varlen
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.model.packed_batch import Packing

# Compiled forms of a block: one for each pack shape with and without gradients. All blocks share them. A run has a few
# shapes and each size of its pictures has one; torch's default is 8, and what comes later would run uncompiled. More
# than 256, torch's limit of all forms of one function, would need another setting too.
_MOST_COMPILED = 256


def prepare_blocks(network: DiffusionTransformer, checkpointing: Checkpointing, compile_blocks: bool) -> None:
    """Replaces the forward of each of ``network.blocks``. To be called once, before the network is sharded.

    ``none`` keeps what autograd needs; ``full`` keeps a block's inputs and recomputes the block in the backward pass;
    ``selective`` also keeps the results of ``saved_ops``, and recomputes only what lies between them.

    If blocks are compiled, torch's limit of compiled forms of a function is raised for the calling thread.
    """
    if compile_blocks:
        torch._dynamo.config.recompile_limit = _MOST_COMPILED  # torch 2.11's torch.compile has no argument for it
    for block in network.blocks:
        forward = block.forward
        if checkpointing != "none":
            forward = _checkpointed(forward, checkpointing)
        if compile_blocks:
            forward = _with_padding(torch.compile(forward, dynamic=False))
        block.forward = forward


def saved_ops() -> list[Any]:
    """The operators whose results ``selective`` keeps: those that cost more FLOPs per byte of their result than a GPU
    computes in the time in which it moves a byte (about 200 on an H200).

    A linear from d channels costs d FLOPs per byte of its bf16 result (576 or more in FiTv2-3B/2), fused attention
    twice the image's length (512 at 256 tokens). AdaLN, norms, RoPE, SiLU and gates cost a few. So does attention that
    writes out its scores, head_dim FLOPs per byte: its products are not kept.

    Sums over a tensor-parallel group belong to the products: they are computed in place, in the kept memory, and
    recomputation would add them twice.
    """
    aten, sums = torch.ops.aten, torch.ops.c10d.allreduce_.default
    names = (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    fused = [getattr(aten, name).default for name in names]
    products = [aten.mm.default, aten.addmm.default, aten._scaled_mm_v2.default]
    return [*products, *fused, *_varlen_ops(), sums]


def _varlen_ops() -> list[Any]:
    import torch.nn.attention.varlen

    return [torch.ops.torch_attn._varlen_attn.default]


def _with_padding(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x_TD: Tensor, *inputs: Any) -> Tensor:
        packing: Packing = inputs[-1]
        if not has_varlen(x_TD):
            _ = packing.padded  # made outside: the compiler cannot trace a cached_property's first use
        return forward(x_TD, *inputs)

    return run


def _checkpointed(forward: Callable[..., Tensor], checkpointing: Checkpointing) -> Callable[..., Tensor]:
    contexts: dict[str, Any] = {}  # the compiler cannot trace a plain function here, not even torch's default
    if checkpointing == "selective":
        contexts = {"context_fn": partial(create_selective_checkpoint_contexts, saved_ops())}

    def run(*inputs: Any) -> Tensor:
        # The network draws no random numbers, so there is no generator state to restore.
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts)

    return run
