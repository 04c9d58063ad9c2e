"""Tensors, parameters and floating point operations of a network, exact and without torch: `fitv2 plan` and
`fitv2 submit` need no more than this."""

import math
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from types import MappingProxyType

from data_sharding.errors import UserError
from fitv2_scale.config.model import TIMESTEP_CHANNELS, TOKEN_CHANNELS, ModelConfig


@cache
def logical_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Each tensor's public name and shape, in the order of ``FiTv2(config).named_parameters()`` (the tests compare)."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    d, lora = config.hidden, config.adaln == "lora"
    linear("x_embedder.proj", TOKEN_CHANNELS, d)
    linear("t_embedder.mlp.0", TIMESTEP_CHANNELS, d)
    linear("t_embedder.mlp.2", d, d)
    shapes["y_embedder.embedding_table.weight"] = (config.classes + 1, d)
    if lora:
        linear("global_adaLN_modulation.1", d, 6 * d)
    for block in (f"blocks.{i}" for i in range(config.depth)):
        if config.qk_norm == "l2_scale":
            shapes[f"{block}.attn.qk_scale"] = (config.heads,)
        linear(f"{block}.attn.qkv", d, 3 * d)
        linear(f"{block}.attn.proj", d, d)
        linear(f"{block}.mlp.fc1_g", d, config.mlp_hidden)
        linear(f"{block}.mlp.fc1_x", d, config.mlp_hidden)
        linear(f"{block}.mlp.fc2", config.mlp_hidden, d)
        linear(f"{block}.adaLN_modulation.1", d, config.adaln_rank if lora else 6 * d)
        if lora:
            linear(f"{block}.adaLN_modulation.2", config.adaln_rank, 6 * d)
    linear("final_layer.linear", d, TOKEN_CHANNELS)
    linear("final_layer.adaLN_modulation.1", d, 2 * d)
    return MappingProxyType(shapes)


def matching(names: Iterable[str], patterns: Collection[str]) -> list[str]:
    """The names that one of the patterns of the config's ``trainable`` matches, in their order."""
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def trained_names(names: Iterable[str], trainable: Collection[str]) -> list[str]:
    """What ``matching`` gives. Raises UserError if that is nothing."""
    if not (trained := matching(names, trainable)):
        raise UserError(f"trainable: no tensor's name matches {trainable}; '*' trains all")
    return trained


def parameter_count(config: ModelConfig, patterns: Collection[str] = ("*",)) -> int:
    """Of all tensors, or of those whose names a pattern matches, as in the config's ``trainable``."""
    shapes = logical_shapes(config)
    return sum(math.prod(shapes[name]) for name in matching(shapes, patterns))


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
