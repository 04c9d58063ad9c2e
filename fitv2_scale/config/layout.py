"""The section ``layout``, and ``Layout``: which rank does what, computed and tested without any process.

Vocabulary: a mesh has axes, a tensor has dims. ``replicate`` copies of the sharded state, each spread over ``shard``
ranks, each of which is a group of ``tensor`` ranks that compute one rank's work together. The replicate x shard groups
are data-parallel. Ranks are numbered with ``tensor`` running fastest, then ``shard``: what talks most lies on
neighbouring ranks, which are those of one node.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Literal

from pydantic import Field

from data_sharding.errors import UserError
from fitv2_scale.config.section import Section

Precision = Literal["fp32", "bf16", "fp8"]
Checkpointing = Literal["none", "selective", "full"]
Reshard = Literal["always", "never"]
GateAndValue = Literal["separate", "merged"]
Kernels = Literal["compiled", "triton"]
AttentionKernels = Literal["auto", "flash4"]


@dataclass(frozen=True)
class Layout:
    replicate: int
    shard: int
    tensor: int = 1

    @classmethod
    def of(cls, world_size: int, replicate: int | Literal["auto"], tensor: int = 1, nodes: int = 1) -> "Layout":
        """``auto`` is one copy on each of ``nodes`` nodes, so that gathering weights needs no network, or a single one
        where the processes do not divide. Raises UserError if ``replicate`` x ``tensor`` does not divide their number.
        """
        if replicate == "auto":
            replicate = nodes if world_size % (nodes * tensor) == 0 else 1
        if world_size % (replicate * tensor):
            asked = {"layout.replicate": replicate, "layout.tensor": tensor}
            keys = " x ".join(key for key, size in asked.items() if size > 1)
            raise UserError(
                f"{keys} is {replicate * tensor}, which does not divide the {world_size} processes started: "
                "choose a divisor"
            )
        return cls(replicate, world_size // (replicate * tensor), tensor)

    @property
    def data_parallel(self) -> int:
        return self.replicate * self.shard

    def data_rank(self, rank: int) -> int:
        return rank // self.tensor

    def tensor_rank(self, rank: int) -> int:
        return rank % self.tensor

    def nodes(self, hosts: Sequence[str]) -> tuple[int, ...]:
        """Data-parallel ranks of each node, in order, from the node's name of each rank; all as if on one node where
        the ranks of a node are no neighbours."""
        runs = [(name, len(list(run))) for name, run in groupby(hosts[:: self.tensor])]
        scattered = len({name for name, _ in runs}) < len(runs)
        return (self.data_parallel,) if scattered else tuple(ranks for _, ranks in runs)


class LayoutConfig(Section):
    engine: Literal["fsdp", "zero3"] = Field(
        "fsdp", description="fsdp: PyTorch FSDP2, HSDP when replicate > 1; zero3: DeepSpeed's ZeRO stage 3"
    )
    replicate: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="copies of the sharded state; divides the number of processes; auto: one per node with fsdp",
    )
    tensor: int = Field(
        1, ge=1, description="processes that share the work on one pack (tensor parallelism); must divide model.heads"
    )
    checkpointing: Checkpointing = Field(
        "none", description="activation checkpointing: recompute nothing, cheap operations (selective), blocks (full)"
    )
    precision: Precision = Field(
        "bf16",
        description="precision of compute; master weights and reductions stay float32; "
        "fp8: bf16, but for the blocks' large products",
    )
    max_tokens: int = Field(16384, ge=64, description="maximum tokens of a pack; the planner picks a capacity up to it")
    pad_to_multiple_of: int = Field(
        8, ge=8, multiple_of=8, description="capacities of packs are multiples of so many tokens, as in 128"
    )
    reshard_after_forward: Reshard = Field(
        "always",
        description="with fsdp; never: weights are gathered once a step, not twice a pack, and held whole between",
    )
    prefetch_blocks: int = Field(
        1, ge=1, le=16, description="with fsdp: blocks whose weights are gathered ahead of the one that computes"
    )
    gate_and_value: GateAndValue = Field(
        "separate", description="the SwiGLU's first two products: separate, or merged into one; with fsdp"
    )
    kernels: Kernels = Field(
        "compiled",
        description="outside of products: the compiler's; triton: backward, written by hand; with fsdp",
    )
    attention: AttentionKernels = Field(
        "auto", description="on GPUs; auto: torch's own kernels; flash4: those of the package flash-attn-4, in training"
    )
    compile: bool | Literal["auto"] = Field("auto", description="torch.compile each block; auto: on CUDA only")

    def compiles(self, on_cuda: bool) -> bool:
        return on_cuda if self.compile == "auto" else self.compile

    @property
    def for_fsdp_alone(self) -> list[str]:
        """The settings, as key=value, that zero3 does not have."""
        keys = ("reshard_after_forward", "prefetch_blocks", "gate_and_value", "kernels")
        given = ((key, getattr(self, key)) for key in keys)
        return [f"layout.{k}={value}" for k, value in given if value != type(self).model_fields[k].default]

    def over(self, ranks: int, nodes: int = 1) -> Layout:
        """The layout of ``ranks`` processes on ``nodes`` nodes. Raises UserError if they do not divide."""
        return Layout.of(ranks, self.replicate, self.tensor, nodes if self.engine == "fsdp" else 1)
