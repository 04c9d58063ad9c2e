"""The sections that define a network, ``model`` (with ``rope``, ``sincos``), and its objective: ``flow``, ``ddpm``."""

from typing import Literal

from pydantic import Field, model_validator

from data_sharding.errors import UserError
from fitv2_scale.config.section import Section

TIMESTEP_CHANNELS = 256
CLASS_TABLE = "y_embedder.embedding_table.weight"  # the tensor whose rows are the classes
LATENT_PIXELS = 8  # of a side, that a latent of a codec stands for
LEAST_PIXELS = 16  # of a side of a token, of patches of 2 x 2 latents: every size is a multiple of it

Mode = Literal["none", "pi", "ntk", "yarn", "vision_ntk", "vision_yarn"]
AttentionScale = Literal["none", "paper", "released"]
SincosMode = Literal["none", "ei", "pi"]
MLP = Literal["swiglu", "swiglu_4d", "gelu"]


class RopeConfig(Section):
    mode: Mode = Field(
        "none",
        description="RoPE beyond train_side: none (unchanged), pi, ntk, yarn; with a separate scale for each axis: "
        "vision_ntk (as the high-resolution stage is trained), vision_yarn",
    )
    attention_scale: AttentionScale = Field(
        "none",
        description="scale of the attention logits by the number of tokens; paper and released code differ",
    )
    train_side: int = Field(
        16, ge=2, description="side, in tokens, of the square images trained on before any extrapolation"
    )


class SincosConfig(Section):
    mode: SincosMode = Field(
        "none",
        description="positions in images whose sides are not train_side; none: as they are; pi: interpolated, so that "
        "they span as much; ei: the table of the square, resized bilinearly",
    )
    train_side: int = Field(16, ge=2, description="side, in tokens, of the square images trained on")


class ModelConfig(Section):
    depth: int = Field(ge=1, description="number of transformer blocks")
    hidden: int = Field(ge=8, description="width of the residual stream")
    heads: int = Field(ge=1, description="attention heads; hidden / heads must be divisible by 4 for 2-D RoPE")
    patch: Literal[2, 4, 8] = Field(2, description="side of a token, in latent pixels")
    latent_channels: int = Field(4, ge=1, description="channels of the codec's latents")
    classes: int = Field(1000, ge=1, description="number of classes; one more embedding row stands for 'no class'")
    qk_norm: Literal["layernorm", "l2_scale", "none"] = Field(
        "layernorm",
        description="layernorm: LayerNorm over head_dim without parameters, as released; l2_scale: L2 norm with a "
        "learned scale per head; none",
    )
    adaln: Literal["lora", "full"] = Field(
        "lora", description="lora: per block a head of rank hidden/4, plus one global head, as released; full: as FiT"
    )
    mlp: MLP = Field(
        "swiglu",
        description="swiglu: of width 8/3 hidden, as FiTv2; swiglu_4d: of 4 hidden, as FiT; gelu: two products, as DiT",
    )
    position: Literal["rope", "sincos", "none"] = Field(
        "rope",
        description="rope: q and k are rotated, as FiT; sincos: a fixed table is added to the tokens, as DiT; none",
    )
    outputs: Literal[1, 2] = Field(
        1,
        description="numbers for each channel of a token; 1: velocity or noise; 2: also the variance, which DDPM "
        "learns and a flow ignores, as SiT does",
    )
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    sincos: SincosConfig = Field(SincosConfig(), description="positions of position=sincos in images of other sizes")
    rope: RopeConfig = Field(RopeConfig(), description="positions in images larger than those first trained on")

    @model_validator(mode="after")
    def _divisible(self):
        if self.hidden % self.heads or (self.hidden // self.heads) % 4:
            raise ValueError(f"hidden {self.hidden} must be heads {self.heads} times a multiple of 4")
        return self

    @model_validator(mode="after")
    def _extrapolates_what_it_has(self):
        if self.position != "rope" and self.rope != RopeConfig():
            raise ValueError(f"rope is for position=rope, and position is {self.position}: leave it out")
        if self.position != "sincos" and self.sincos != SincosConfig():
            raise ValueError(f"sincos is for position=sincos, and position is {self.position}: leave it out")
        return self

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def mlp_hidden(self) -> int:
        """Hidden units of the MLP. FiTv2's SwiGLU has two thirds of 4 x hidden, rounded down (not to a multiple)."""
        return 8 * self.hidden // 3 if self.mlp == "swiglu" else 4 * self.hidden

    @property
    def extrapolation(self) -> RopeConfig | SincosConfig:
        """Positions in images of other sizes than first trained on."""
        return self.sincos if self.position == "sincos" else self.rope

    @property
    def token_channels(self) -> int:
        """Numbers of a token: the latents of its patch."""
        return self.latent_channels * self.patch**2

    @property
    def pixels_per_token(self) -> int:
        """Of a side."""
        return LATENT_PIXELS * self.patch

    @property
    def adaln_rank(self) -> int:
        return self.hidden // 4


def parse_size(size: str, pixels_per_token: int) -> tuple[int, int]:
    """'160x320' (height x width in pixels) as (rows, columns) in tokens of so many pixels a side. Raises UserError."""
    sides, of = size.split("x"), pixels_per_token
    if len(sides) != 2 or not all(s.isdecimal() for s in sides) or any(int(s) % of for s in sides):
        raise UserError(
            f"size '{size}': give HEIGHTxWIDTH in pixels, multiples of {of} (a token), as in {10 * of}x{20 * of}"
        )
    rows, columns = (int(s) // of for s in sides)
    if not rows or not columns:
        raise UserError(f"size '{size}': each side needs at least {of} pixels")
    return rows, columns


def parse_pixels(size: str) -> tuple[int, int]:
    """'160x320' as (height, width), of a network with any patch. Raises UserError."""
    rows, columns = parse_size(size, LEAST_PIXELS)
    return rows * LEAST_PIXELS, columns * LEAST_PIXELS


class FlowConfig(Section):
    t_sampler: Literal["logit_normal", "uniform"] = Field(
        "logit_normal", description="density of training times; logit_normal is sigmoid(N(0, 1)), as released"
    )
    label_dropout: float = Field(0.1, ge=0, le=1, description="fraction of images trained without their class, for CFG")


class DdpmConfig(Section):
    label_dropout: float = Field(0.1, ge=0, le=1, description="fraction of images trained without their class, for CFG")
