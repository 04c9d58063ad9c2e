"""One network for FiTv2 (arXiv 2410.13925), FiT (2402.12376), DiT (2212.09748) and SiT (2401.08740), each exactly as
released: ``ModelConfig`` says which, and module names are the public names of the weights.

Letters in shapes: T tokens, I images, D hidden, H heads, C token channels (16 with patches of 2 x 2). Conditioning is
computed once per image and gathered to its tokens. The network takes packed tokens and knows no processes: linears come
from a factory, so that tensor parallelism can replace them.
"""

import math

import torch
from torch import Tensor, nn

from fitv2_scale.config.model import TIMESTEP_CHANNELS, ModelConfig
from fitv2_scale.model.block_parts import BlockParts
from fitv2_scale.model.linear import LinearFactory, plain_linear
from fitv2_scale.model.modulation import modulation
from fitv2_scale.model.packed_batch import Packing
from fitv2_scale.model.positions import Positions, positions_of


class PatchEmbed(nn.Module):
    def __init__(self, config: ModelConfig, linear: LinearFactory):
        super().__init__()
        self.proj = linear(config.token_channels, config.hidden, "replicated")

    def forward(self, x_TC: Tensor) -> Tensor:
        return self.proj(x_TC.to(self.proj.get_parameter("weight").dtype))


class TimestepEmbed(nn.Module):
    """Sinusoids [cos, sin] of t as it is: in [0, 1] for a flow, 0 to 999 for DDPM. Then an MLP."""

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
        self.linear = linear(config.hidden, config.outputs * config.token_channels, "replicated")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(config.hidden, 2 * config.hidden, "replicated"))

    def forward(self, x_TD: Tensor, c_ID: Tensor, packing: Packing) -> Tensor:
        return self.linear(modulation(self.adaLN_modulation(c_ID), 2, packing).modulate(x_TD, 0, 1))


class DiffusionTransformer(nn.Module):
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
        positions: Positions | None = None,
    ) -> Tensor:
        """What the objective asks for at noised tokens x_TC, such as their velocity: (T, C); with
        ``config.outputs`` = 2 also C numbers for the variance of each token, behind the others: (T, 2 C).

        ``t_I`` is the time of each image, ``label_I`` its class; ``config.classes`` means no class. ``positions`` are
        used instead of the config's own.
        """
        places = positions or positions_of(self.config, packing)
        x_TD = self.x_embedder(x_TC)
        if places.added_TD is not None:
            x_TD = x_TD + places.added_TD.to(x_TD.dtype)
        c_ID = self.t_embedder(t_I) + self.y_embedder(label_I)
        shared_I6D = None if self.global_adaLN_modulation is None else self.global_adaLN_modulation(c_ID)
        for block in self.blocks:
            x_TD = block(x_TD, c_ID, shared_I6D, places.rope_TD, packing)
        return self.final_layer(x_TD, c_ID, packing)
