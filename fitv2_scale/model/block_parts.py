"""What a block is made of: another way to compute a part, or another family of networks, is another row here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fitv2_scale.config.layout import GateAndValue, Kernels
from fitv2_scale.config.model import MLP, ModelConfig
from fitv2_scale.model.block import Attention, Block, GeluMLP, MergedSwiGLU, SwiGLU, full_head, low_rank_head
from fitv2_scale.model.kernels.block import FusedAttention, FusedBlock, FusedGeluMLP, FusedMergedSwiGLU, FusedSwiGLU
from fitv2_scale.model.linear import LinearFactory

_BLOCK: dict[Kernels, type[Block]] = {"compiled": Block, "triton": FusedBlock}
_ATTENTION: dict[Kernels, type[Attention]] = {"compiled": Attention, "triton": FusedAttention}
Activation = Literal["swiglu", "gelu"]
_ACTIVATION: dict[MLP, Activation] = {"swiglu": "swiglu", "swiglu_4d": "swiglu", "gelu": "gelu"}
_MLP: dict[tuple[Activation, Kernels, GateAndValue], Callable[[ModelConfig, LinearFactory], nn.Module]] = {
    ("swiglu", "compiled", "separate"): SwiGLU,
    ("swiglu", "compiled", "merged"): MergedSwiGLU,
    ("swiglu", "triton", "separate"): FusedSwiGLU,
    ("swiglu", "triton", "merged"): FusedMergedSwiGLU,
    ("gelu", "compiled", "separate"): GeluMLP,
    ("gelu", "triton", "separate"): FusedGeluMLP,
}
_ADALN: dict[str, Callable[[ModelConfig, LinearFactory], nn.Sequential]] = {"full": full_head, "lora": low_rank_head}


@dataclass(frozen=True)
class BlockParts:
    """A block, and what makes its sub-modules."""

    block: type[Block]
    attn: Callable[[ModelConfig, LinearFactory], Attention]
    mlp: Callable[[ModelConfig, LinearFactory], nn.Module]
    adaln: Callable[[ModelConfig, LinearFactory], nn.Sequential]

    @classmethod
    def of(
        cls, config: ModelConfig, gate_and_value: GateAndValue = "separate", kernels: Kernels = "compiled"
    ) -> "BlockParts":
        mlp = _MLP[_ACTIVATION[config.mlp], kernels, gate_and_value]
        return cls(_BLOCK[kernels], _ATTENTION[kernels], mlp, _ADALN[config.adaln])

    def make(self, config: ModelConfig, linear: LinearFactory) -> Block:
        return self.block(self.attn(config, linear), self.mlp(config, linear), self.adaln(config, linear))
