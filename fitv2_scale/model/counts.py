"""Parameters and floating point operations of a network, exact and without building it on a device."""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from functools import cache
from types import MappingProxyType

import torch

from fitv2_scale.config.model import TIMESTEP_CHANNELS, TOKEN_CHANNELS, ModelConfig
from fitv2_scale.model.fitv2 import FiTv2


@cache
def logical_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Each tensor's public name and shape, in the network's order."""
    with torch.device("meta"):
        return MappingProxyType({name: tuple(p.shape) for name, p in FiTv2(config).named_parameters()})


def parameter_count(config: ModelConfig, patterns: Collection[str] = ("*",)) -> int:
    """Of all tensors, or of those whose names a pattern matches, as in the config's ``trainable``."""
    return sum(
        torch.Size(shape).numel()
        for name, shape in logical_shapes(config).items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    )


def forward_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of one forward pass of one image of ``tokens`` tokens: two per multiply-add of a matrix product.

    Linears over tokens, attention's two products, and the conditioning once an image. Elementwise work is left out.
    A training step costs three times as much; recomputation and padding are not counted, as usual for MFU.
    """
    d = config.hidden
    per_token_block = 4 * d * d + 3 * d * config.mlp_hidden + 2 * d * tokens
    per_token = config.depth * per_token_block + 2 * d * TOKEN_CHANNELS
    if config.adaln == "lora":
        adaln = config.depth * (d + 6 * d) * config.adaln_rank + 6 * d * d
    else:
        adaln = config.depth * 6 * d * d
    per_image = adaln + TIMESTEP_CHANNELS * d + d * d + 2 * d * d
    return 2 * (tokens * per_token + per_image)
