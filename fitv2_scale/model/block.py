"""A block of the network: attention and an MLP, each between a modulated norm and a gate.

``block_parts`` says what a block is made of. Letters in shapes: as in ``network``; I6D are the six modulation vectors
of each image.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.attention import attention
from fitv2_scale.model.linear import LinearFactory, merged
from fitv2_scale.model.modulation import layer_norm, modulation
from fitv2_scale.model.packed_batch import Packing
from fitv2_scale.model.rope import rotate

Rope = tuple[Tensor, Tensor] | None  # by which q and k are turned; None: not at all


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

    def forward(self, x_TD: Tensor, rope_TD: Rope, packing: Packing) -> Tensor:
        out_THD = attention(*self.heads(x_TD, rope_TD), packing)
        return self.proj(out_THD.flatten(1))

    def heads(self, x_TD: Tensor, rope_TD: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of each head, (T, H, D)."""
        q_THD, k_THD, v_THD = self.qkv(x_TD).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        if self.qk_norm == "layernorm":
            q_THD, k_THD = layer_norm(q_THD), layer_norm(k_THD)
        elif self.qk_norm == "l2_scale":
            # attention() divides by sqrt(head_dim): undone here, so that qk_scale alone scales the logits.
            q_THD = F.normalize(q_THD, dim=-1) * (self.qk_scale * math.sqrt(self.head_dim))[:, None]
            k_THD = F.normalize(k_THD, dim=-1)
        if rope_TD is None:
            return q_THD, k_THD, v_THD
        return rotate(q_THD, *rope_TD), rotate(k_THD, *rope_TD), v_THD


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


class GeluMLP(nn.Module):
    def __init__(self, config: ModelConfig, linear: LinearFactory):
        super().__init__()
        self.fc1 = linear(config.hidden, config.mlp_hidden, "column")
        self.fc2 = linear(config.mlp_hidden, config.hidden, "row")

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_TD), approximate="tanh"))


def full_head(config: ModelConfig, linear: LinearFactory) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), linear(config.hidden, 6 * config.hidden, "replicated"))


def low_rank_head(config: ModelConfig, linear: LinearFactory) -> nn.Sequential:
    """Both factors are trained from scratch; "LoRA" names the shape, nothing is frozen."""
    down = linear(config.hidden, config.adaln_rank, "replicated")
    return nn.Sequential(nn.SiLU(), down, linear(config.adaln_rank, 6 * config.hidden, "replicated"))


class Block(nn.Module):
    def __init__(self, attn: Attention, mlp: nn.Module, adaln: nn.Sequential):
        super().__init__()
        self.attn, self.mlp, self.adaLN_modulation = attn, mlp, adaln

    def forward(self, x_TD: Tensor, c_ID: Tensor, shared_I6D: Tensor | None, rope_TD: Rope, packing: Packing) -> Tensor:
        modulation_I6D = self.adaLN_modulation(c_ID)
        if shared_I6D is not None:
            modulation_I6D = modulation_I6D + shared_I6D  # S_i = W_g c + W2_i W1_i c (eq. 11)
        return self.apply_modulated(x_TD, modulation_I6D, rope_TD, packing)

    def apply_modulated(self, x_TD: Tensor, modulation_I6D: Tensor, rope_TD: Rope, packing: Packing) -> Tensor:
        """``modulation_I6D`` holds shift, scale and gate of the attention, then those of the MLP."""
        m = modulation(modulation_I6D, 6, packing)
        x_TD = m.add_gated(x_TD, self.attn(m.modulate(x_TD, 0, 1), rope_TD, packing), 2)
        return m.add_gated(x_TD, self.mlp(m.modulate(x_TD, 3, 4)), 5)
