"""The FiTv2 network (arXiv 2410.13925), exactly as released: module names are the public names of its weights.

Letters in shapes: T tokens, I images, D hidden, H heads, C = 16 token channels. Conditioning is computed once per image
and gathered to its tokens. The network takes packed tokens and knows no processes: linears come from a factory, so that
tensor parallelism can replace them.
"""

import math

import torch
from torch import Tensor, nn

from fitv2_scale.config.model import TIMESTEP_CHANNELS, TOKEN_CHANNELS, ModelConfig
from fitv2_scale.model.block_parts import BlockParts
from fitv2_scale.model.extrapolation import extrapolated_table
from fitv2_scale.model.linear import LinearFactory, plain_linear
from fitv2_scale.model.modulation import modulation
from fitv2_scale.model.packed_batch import Packing
from fitv2_scale.model.rope import by_channel, rope_table


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


class FinalLayer(nn.Module):
    def __init__(self, config: ModelConfig, linear: LinearFactory):
        super().__init__()
        self.linear = linear(config.hidden, TOKEN_CHANNELS, "replicated")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(config.hidden, 2 * config.hidden, "replicated"))

    def forward(self, x_TD: Tensor, c_ID: Tensor, packing: Packing) -> Tensor:
        return self.linear(modulation(self.adaLN_modulation(c_ID), 2, packing).modulate(x_TD, 0, 1))


class FiTv2(nn.Module):
    def __init__(self, config: ModelConfig, linear: LinearFactory = plain_linear, parts: BlockParts | None = None):
        """``parts`` are what blocks are made of, if not of what ``config`` alone says."""
        super().__init__()
        self.config, parts = config, parts or BlockParts.of(config)
        self.x_embedder = PatchEmbed(config, linear)
        self.t_embedder = TimestepEmbed(config, linear)
        self.y_embedder = LabelEmbed(config)
        self.global_adaLN_modulation = (
            nn.Sequential(nn.SiLU(), linear(config.hidden, 6 * config.hidden, "replicated"))
            if config.adaln == "lora"
            else None
        )
        self.blocks = nn.ModuleList(parts.make(config, linear) for _ in range(config.depth))
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
        rope_TD = by_channel(*(rope or self._rope(packing)))  # once for all blocks
        for block in self.blocks:
            x_TD = block(x_TD, c_ID, shared_I6D, rope_TD, packing)
        return self.final_layer(x_TD, c_ID, packing)

    def _rope(self, packing: Packing) -> tuple[Tensor, Tensor]:
        config = self.config
        if config.rope.mode == config.rope.attention_scale == "none":
            return rope_table(packing.positions_T2, config.head_dim, config.rope_theta)
        return extrapolated_table(packing, config.rope, config.head_dim, config.rope_theta)
