"""A block of the network: attention and SwiGLU, each between a modulated norm and a gate.

A block is assembled from ``BlockParts``: another way to compute one of its parts, or another family of networks, is
another class there. Letters in shapes: as in ``fitv2``; I6D are the six modulation vectors of each image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitv2_scale.config.layout import GateAndValue, Kernels
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.attention import attention
from fitv2_scale.model.kernels.modulation import Summed
from fitv2_scale.model.linear import LinearFactory, merged
from fitv2_scale.model.modulation import Modulation, layer_norm, modulation
from fitv2_scale.model.packed_batch import Packing
from fitv2_scale.model.rope import rotate


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, linear: LinearFactory):
        super().__init__()
        self.head_dim, self.qk_norm = config.head_dim, config.qk_norm
        self.qkv = linear(config.hidden, 3 * config.hidden, "column")  # rows ordered (3, heads, head_dim)
        self.proj = linear(config.hidden, config.hidden, "row")
        if config.qk_norm == "l2_scale":
            rows = self.qkv.get_parameter("weight").shape[0]
            heads = rows // (3 * config.head_dim)  # of this rank, by what the factory made
            self.qk_scale = nn.Parameter(torch.empty(heads))

    def forward(self, x_TD: Tensor, rope_TD: tuple[Tensor, Tensor], packing: Packing) -> Tensor:
        q_THD, k_THD, v_THD = self.qkv(x_TD).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        if self.qk_norm == "layernorm":
            q_THD, k_THD = layer_norm(q_THD), layer_norm(k_THD)
        elif self.qk_norm == "l2_scale":
            # attention() divides by sqrt(head_dim): undone here, so that qk_scale alone scales the logits.
            q_THD = F.normalize(q_THD, dim=-1) * (self.qk_scale * math.sqrt(self.head_dim))[:, None]
            k_THD = F.normalize(k_THD, dim=-1)
        out_THD = attention(rotate(q_THD, *rope_TD), rotate(k_THD, *rope_TD), v_THD, packing)
        return self.proj(out_THD.flatten(1))


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig, linear: LinearFactory):
        super().__init__()
        self.fc1_g = linear(config.hidden, config.mlp_hidden, "column")  # gate
        self.fc1_x = linear(config.hidden, config.mlp_hidden, "column")  # value
        self.fc2 = linear(config.mlp_hidden, config.hidden, "row")

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1_g(x_TD)) * self.fc1_x(x_TD))


class MergedSwiGLU(SwiGLU):
    """The same weights. The gradient of x is one product over both widths, and that of the weights one of twice the
    rows, which fills a GPU better; results differ by rounding."""

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, value = merged(x_TD, self.fc1_g, self.fc1_x)
        return self.fc2(F.silu(gate) * value)


def _full_head(config: ModelConfig, linear: LinearFactory) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), linear(config.hidden, 6 * config.hidden, "replicated"))


def _low_rank_head(config: ModelConfig, linear: LinearFactory) -> nn.Sequential:
    """Both factors are trained from scratch; "LoRA" names the shape, nothing is frozen."""
    down = linear(config.hidden, config.adaln_rank, "replicated")
    return nn.Sequential(nn.SiLU(), down, linear(config.adaln_rank, 6 * config.hidden, "replicated"))


_SWIGLU: dict[GateAndValue, Callable[[ModelConfig, LinearFactory], SwiGLU]] = {
    "separate": SwiGLU,
    "merged": MergedSwiGLU,
}
_MODULATION: dict[Kernels, Callable[[Tensor, int, Packing], Modulation]] = {"compiled": modulation, "triton": Summed}
_ADALN: dict[str, Callable[[ModelConfig, LinearFactory], nn.Sequential]] = {"full": _full_head, "lora": _low_rank_head}


@dataclass(frozen=True)
class BlockParts:
    """What makes the sub-modules of a block, by the public name of their weights, and what applies its modulation."""

    attn: Callable[[ModelConfig, LinearFactory], Attention]
    mlp: Callable[[ModelConfig, LinearFactory], SwiGLU]
    adaLN_modulation: Callable[[ModelConfig, LinearFactory], nn.Sequential]
    modulation: Callable[[Tensor, int, Packing], Modulation]

    @classmethod
    def of(
        cls, config: ModelConfig, gate_and_value: GateAndValue = "separate", kernels: Kernels = "compiled"
    ) -> "BlockParts":
        return cls(Attention, _SWIGLU[gate_and_value], _ADALN[config.adaln], _MODULATION[kernels])


class Block(nn.Module):
    def __init__(self, config: ModelConfig, linear: LinearFactory, parts: BlockParts):
        super().__init__()
        self.attn = parts.attn(config, linear)
        self.mlp = parts.mlp(config, linear)
        self.adaLN_modulation = parts.adaLN_modulation(config, linear)
        self._modulation = parts.modulation

    def forward(
        self, x_TD: Tensor, c_ID: Tensor, shared_I6D: Tensor | None, rope_TD: tuple[Tensor, Tensor], packing: Packing
    ) -> Tensor:
        modulation_I6D = self.adaLN_modulation(c_ID)
        if shared_I6D is not None:
            modulation_I6D = modulation_I6D + shared_I6D  # S_i = W_g c + W2_i W1_i c (eq. 11)
        m = self._modulation(modulation_I6D, 6, packing)  # shift, scale and gate of the attention, and those of the MLP
        x_TD = m.add_gated(x_TD, self.attn(m.modulate(x_TD, 0, 1), rope_TD, packing), 2)
        return m.add_gated(x_TD, self.mlp(m.modulate(x_TD, 3, 4)), 5)
