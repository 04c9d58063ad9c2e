"""RoPE for images larger than the training images: each image in a pack has frequencies of its own, by its size.

L is ``RopeConfig.train_side``, the side in tokens of a square image as large as the training's. Along an axis of n
tokens the scale is s = max(1, n / L): one s for both axes, from the longer one, or one per axis (``vision_``).
With D = head_dim / 2 channels per axis and plain frequencies f_i = theta^(-2i/D), the modes (FiT, arXiv 2402.12376,
Sec. 3.4), as in FiTv2's released code, are

    pi            f_i / s
    ntk           (theta s^(D/(D-2)))^(-2i/D); the paper writes |D|, the code takes that of one axis
    yarn          f_i where L holds more than 32 rotations, f_i / s where less than 1, a ramp over i between; q k is
                  also multiplied by (1 + ln(s) / 10)^2, with s always from the longer axis

and the attention scale multiplies q k by a power of the number of tokens N:

    paper         max(1, ln N / ln L^2)
    released      ln 2N / ln L^2 where 2N > L^2, else 1 (so 1.125 for 16 x 16 at L = 16)

For an image within L x L all of these are plain RoPE, bit for bit, except for the released attention scale.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fitv2_scale.config.model import ModelConfig, RopeConfig
from fitv2_scale.model.packed_batch import Packing
from fitv2_scale.model.rope import axis_frequencies, table

_FASTEST, _SLOWEST = 32, 1  # YaRN's beta: rotations over L above and below which the ramp ends


# Released commands of FiTv2 (README of whlzy/FiT), at L = 16, that the general rule below would not give.
_PUBLISHED = {(10, 20): RopeConfig(mode="vision_ntk")}


def default_rope(model: ModelConfig, rows: int, columns: int) -> RopeConfig:
    """The RoPE of the published evaluations for an image of this size.

    A model trained with extrapolation keeps its own. Otherwise plain RoPE for at most L x L tokens and VisionNTK for
    more, in FiTv2 with the released attention scale; and VisionNTK alone for 160x320, as in FiTv2's released command.
    """
    trained, is_fitv2 = model.rope, model.mlp == "swiglu"
    if trained.mode != "none":
        return trained
    if is_fitv2 and trained.train_side == 16 and (rows, columns) in _PUBLISHED:
        return _PUBLISHED[rows, columns]
    if rows * columns <= trained.train_side**2:
        return trained
    scale = "released" if is_fitv2 else trained.attention_scale
    return trained.model_copy(update={"mode": "vision_ntk", "attention_scale": scale})


def extrapolated_table(
    packing: Packing, ropes: RopeConfig | Sequence[RopeConfig], head_dim: int, theta: float
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (T, head_dim / 2), as ``rope_table`` gives them, attention scale included.

    ``ropes`` is one for all images or one per slot of the pack. The sizes of images are taken from the positions.
    """
    images = packing.cu_seqlens_I1.numel() - 1
    size_I2 = packing.sizes_I2
    ropes = [ropes] * images if isinstance(ropes, RopeConfig) else ropes
    kinds = list(dict.fromkeys(ropes))
    frequency_I2F, factor_I = turns(kinds[0], size_I2, head_dim, theta)
    if len(kinds) > 1:
        kind_I = torch.tensor([kinds.index(rope) for rope in ropes], device=size_I2.device)
        for number, rope in enumerate(kinds[1:], 1):
            frequency, factor = turns(rope, size_I2, head_dim, theta)
            frequency_I2F = torch.where((kind_I == number)[:, None, None], frequency, frequency_I2F)
            factor_I = torch.where(kind_I == number, factor, factor_I)
    # Applied to q and to k, hence the root.
    return table(packing.positions_T2, frequency_I2F[packing.image_T], factor_I.sqrt()[packing.image_T])


def turns(rope: RopeConfig, size_I2: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Radians per token of each pair of channels, float64 (I, 2, head_dim / 4), and the factor of q k, float64 (I,)."""
    size_I2 = size_I2.double()
    plain_F = axis_frequencies(head_dim, theta, size_I2.device)
    own_I2 = (size_I2 / rope.train_side).clamp(min=1)
    most_I2 = own_I2.amax(1, keepdim=True).expand(-1, 2)
    scale_I21 = (own_I2 if rope.mode.startswith("vision_") else most_I2)[..., None]
    axis_dim, factor_I = head_dim // 2, attention_factor(rope, size_I2)
    match rope.mode.removeprefix("vision_"):
        case "pi":
            return plain_F / scale_I21, factor_I
        case "ntk":
            power = axis_dim / (axis_dim - 2) if axis_dim > 2 else 0.0
            exponent_F = torch.arange(0, axis_dim, 2, device=size_I2.device, dtype=torch.float64) / axis_dim
            return plain_F * scale_I21 ** (-power * exponent_F), factor_I
        case "yarn":
            slowed_F = _ramp(axis_dim, theta, rope.train_side).to(size_I2.device)
            temperature_I = (1 + most_I2[:, 0].log() / 10).square()
            return plain_F * (1 - slowed_F * (1 - 1 / scale_I21)), factor_I * temperature_I
    return plain_F.expand(*size_I2.shape, -1), factor_I


def attention_factor(rope: RopeConfig, size_I2: Tensor) -> Tensor:
    """The factor by which the attention scale multiplies q k, float64 (I,)."""
    tokens_I, train = size_I2.double().prod(1), math.log(rope.train_side**2)
    if rope.attention_scale == "paper":
        return (tokens_I.log() / train).clamp(min=1)
    if rope.attention_scale == "released":
        return ((2 * tokens_I).log() / train).clamp(min=1)
    return torch.ones_like(tokens_I)


def _ramp(axis_dim: int, theta: float, train_side: int) -> Tensor:
    """How far YaRN slows each frequency down, from 0 (not at all) to 1 (as PI): float64 (axis_dim / 2,)."""

    def index_of(rotations: int) -> float:
        """The (fractional) index of the frequency that makes so many rotations over L."""
        return axis_dim * math.log(train_side / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(index_of(_FASTEST)), 0), min(math.ceil(index_of(_SLOWEST)), axis_dim - 1)
    index_F = torch.arange(axis_dim // 2, dtype=torch.float64)
    return ((index_F - low) / (high - low or 0.001)).clamp(0, 1)
