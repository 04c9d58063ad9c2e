"""The FiTv2 network (arXiv 2410.13925), exactly as released: module names are the public names of its weights.

Letters in shapes: T tokens, I images, D hidden, H heads, C = 16 token channels. Conditioning is computed once per image
and gathered to its tokens. The network takes packed tokens and knows no processes: linears come from a factory, so that
tensor parallelism can replace them.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitv2_scale.config.model import TIMESTEP_CHANNELS, TOKEN_CHANNELS, ModelConfig
from fitv2_scale.model.attention import attention, has_varlen
from fitv2_scale.model.extrapolation import extrapolated_table
from fitv2_scale.model.gather import to_tokens
from fitv2_scale.model.packed_batch import Packing
from fitv2_scale.model.rope import rope_table, rotate

NORM_EPS = 1e-6

Role = Literal["column", "row", "replicated"]
LinearFactory = Callable[[int, int, Role], nn.Module]


def plain_linear(in_features: int, out_features: int, role: Role) -> nn.Module:
    """The factory at tensor = 1. It ignores ``role``, which says how a tensor-parallel group splits the weight."""
    return nn.Linear(in_features, out_features)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def modulate(x_TD: Tensor, shift_TD: Tensor, scale_TD: Tensor) -> Tensor:
    return layer_norm(x_TD) * (1 + scale_TD) + shift_TD


class PatchEmbed(nn.Module):
    def __init__(self, config: ModelConfig, linear: LinearFactory):
        super().__init__()
        self.proj = linear(TOKEN_CHANNELS, config.hidden, "replicated")

    def forward(self, x_TC: Tensor) -> Tensor:
        return self.proj(x_TC.to(self.proj.get_parameter("weight").dtype))


class TimestepEmbed(nn.Module):
    """Sinusoids [cos, sin] of t in [0, 1], not scaled by 1000, then an MLP."""

    def __init__(self, config: ModelConfig, linear: LinearFactory):
        super().__init__()
        self.mlp = nn.Sequential(
            linear(TIMESTEP_CHANNELS, config.hidden, "replicated"),
            nn.SiLU(),
            linear(config.hidden, config.hidden, "replicated"),
        )

    def forward(self, t_I: Tensor) -> Tensor:
        half = TIMESTEP_CHANNELS // 2
        frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=t_I.device, dtype=torch.float32) / half)
        angle = t_I.float()[:, None] * frequency
        dtype = self.mlp[0].get_parameter("weight").dtype
        return self.mlp(torch.cat((angle.cos(), angle.sin()), -1).to(dtype))


class LabelEmbed(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embedding_table = nn.Embedding(config.classes + 1, config.hidden)  # last row: no class

    def forward(self, label_I: Tensor) -> Tensor:
        return self.embedding_table(label_I)


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

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], packing: Packing) -> Tensor:
        q_THD, k_THD, v_THD = self.qkv(x_TD).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        if self.qk_norm == "layernorm":
            q_THD, k_THD = layer_norm(q_THD), layer_norm(k_THD)
        elif self.qk_norm == "l2_scale":
            # attention() divides by sqrt(head_dim): undone here, so that qk_scale alone scales the logits.
            q_THD = F.normalize(q_THD, dim=-1) * (self.qk_scale * math.sqrt(self.head_dim))[:, None]
            k_THD = F.normalize(k_THD, dim=-1)
        out_THD = attention(rotate(q_THD, *rope), rotate(k_THD, *rope), v_THD, packing)
        return self.proj(out_THD.flatten(1))


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig, linear: LinearFactory):
        super().__init__()
        self.fc1_g = linear(config.hidden, config.mlp_hidden, "column")  # gate
        self.fc1_x = linear(config.hidden, config.mlp_hidden, "column")  # value
        self.fc2 = linear(config.mlp_hidden, config.hidden, "row")

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1_g(x_TD)) * self.fc1_x(x_TD))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, linear: LinearFactory):
        super().__init__()
        self.attn = Attention(config, linear)
        self.mlp = SwiGLU(config, linear)
        self.adaLN_modulation = _adaln_head(config, linear)

    def forward(
        self, x_TD: Tensor, c_ID: Tensor, shared_I6D: Tensor | None, rope: tuple[Tensor, Tensor], packing: Packing
    ) -> Tensor:
        modulation_I6D = self.adaLN_modulation(c_ID)
        if shared_I6D is not None:
            modulation_I6D = modulation_I6D + shared_I6D  # S_i = W_g c + W2_i W1_i c (eq. 11)
        modulation_T6D = to_tokens(modulation_I6D, packing.image_T)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation_T6D.chunk(6, -1)
        x_TD = x_TD + gate_msa * self.attn(modulate(x_TD, shift_msa, scale_msa), rope, packing)
        return x_TD + gate_mlp * self.mlp(modulate(x_TD, shift_mlp, scale_mlp))


def _adaln_head(config: ModelConfig, linear: LinearFactory) -> nn.Sequential:
    out = 6 * config.hidden
    if config.adaln == "full":
        return nn.Sequential(nn.SiLU(), linear(config.hidden, out, "replicated"))
    # Both factors are trained from scratch; "LoRA" names the shape, nothing is frozen.
    down, up = linear(config.hidden, config.adaln_rank, "replicated"), linear(config.adaln_rank, out, "replicated")
    return nn.Sequential(nn.SiLU(), down, up)


class FinalLayer(nn.Module):
    def __init__(self, config: ModelConfig, linear: LinearFactory):
        super().__init__()
        self.linear = linear(config.hidden, TOKEN_CHANNELS, "replicated")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(config.hidden, 2 * config.hidden, "replicated"))

    def forward(self, x_TD: Tensor, c_ID: Tensor, packing: Packing) -> Tensor:
        shift_TD, scale_TD = to_tokens(self.adaLN_modulation(c_ID), packing.image_T).chunk(2, -1)
        return self.linear(modulate(x_TD, shift_TD, scale_TD))


class FiTv2(nn.Module):
    def __init__(self, config: ModelConfig, linear: LinearFactory = plain_linear):
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config, linear)
        self.t_embedder = TimestepEmbed(config, linear)
        self.y_embedder = LabelEmbed(config)
        self.global_adaLN_modulation = (
            nn.Sequential(nn.SiLU(), linear(config.hidden, 6 * config.hidden, "replicated"))
            if config.adaln == "lora"
            else None
        )
        self.blocks = nn.ModuleList(Block(config, linear) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, linear)

    def forward(
        self,
        x_TC: Tensor,
        t_I: Tensor,
        label_I: Tensor,
        packing: Packing,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The velocity at noised tokens x_TC: (T, 16).

        ``t_I`` is the time of each image (0 noise, 1 data), ``label_I`` its class; ``config.classes`` means no class.
        ``rope`` is a table to use instead of the config's own (see ``extrapolation``).
        """
        x_TD = self.x_embedder(x_TC)
        c_ID = self.t_embedder(t_I) + self.y_embedder(label_I)
        shared_I6D = None if self.global_adaLN_modulation is None else self.global_adaLN_modulation(c_ID)
        rope = rope or self._rope(packing)
        if not has_varlen(x_TD):
            _ = packing.padded  # made outside of the blocks: the compiler cannot trace a cached_property's first use
        for block in self.blocks:
            x_TD = block(x_TD, c_ID, shared_I6D, rope, packing)
        return self.final_layer(x_TD, c_ID, packing)

    def _rope(self, packing: Packing) -> tuple[Tensor, Tensor]:
        config = self.config
        if config.rope.mode == config.rope.attention_scale == "none":
            return rope_table(packing.positions_T2, config.head_dim, config.rope_theta)
        return extrapolated_table(packing, config.rope, config.head_dim, config.rope_theta)
