"""What a block is made of: another way to compute a part, or another family of networks, is another row here."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fitv2_scale.config.layout import GateAndValue, Kernels
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.block import Attention, Block, MergedSwiGLU, SwiGLU, full_head, low_rank_head
from fitv2_scale.model.kernels.block import FusedAttention, FusedBlock, FusedMergedSwiGLU, FusedSwiGLU
from fitv2_scale.model.linear import LinearFactory

_BLOCK: dict[Kernels, type[Block]] = {"compiled": Block, "triton": FusedBlock}
_ATTENTION: dict[Kernels, type[Attention]] = {"compiled": Attention, "triton": FusedAttention}
_MLP: dict[tuple[Kernels, GateAndValue], type[SwiGLU]] = {
    ("compiled", "separate"): SwiGLU,
    ("compiled", "merged"): MergedSwiGLU,
    ("triton", "separate"): FusedSwiGLU,
    ("triton", "merged"): FusedMergedSwiGLU,
}
_ADALN: dict[str, Callable[[ModelConfig, LinearFactory], nn.Sequential]] = {"full": full_head, "lora": low_rank_head}


@dataclass(frozen=True)
class BlockParts:
    """A block, and what makes its sub-modules."""

    block: type[Block]
    attn: Callable[[ModelConfig, LinearFactory], Attention]
    mlp: Callable[[ModelConfig, LinearFactory], SwiGLU]
    adaln: Callable[[ModelConfig, LinearFactory], nn.Sequential]

    @classmethod
    def of(
        cls, config: ModelConfig, gate_and_value: GateAndValue = "separate", kernels: Kernels = "compiled"
    ) -> "BlockParts":
        return cls(_BLOCK[kernels], _ATTENTION[kernels], _MLP[kernels, gate_and_value], _ADALN[config.adaln])

    def make(self, config: ModelConfig, linear: LinearFactory) -> Block:
        return self.block(self.attn(config, linear), self.mlp(config, linear), self.adaln(config, linear))
