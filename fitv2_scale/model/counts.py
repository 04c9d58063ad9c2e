"""Tensors, parameters and floating point operations of a network, exact and without torch: `fitv2 plan` and
`fitv2 submit` need no more than this."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from types import MappingProxyType
from typing import Literal

from data_sharding.errors import UserError
from fitv2_scale.config.model import CLASS_TABLE, MLP, TIMESTEP_CHANNELS, ModelConfig

# How a tensor-parallel group divides a tensor: not at all, by rows, by those of each third of it, or by columns.
Cut = Literal["whole", "rows", "rows_of_thirds", "columns"]

INTO_MLP: Mapping[MLP, tuple[str, ...]] = {  # the linears from the residual stream into the MLP
    "swiglu": ("fc1_g", "fc1_x"),
    "swiglu_4d": ("fc1_g", "fc1_x"),
    "gelu": ("fc1",),
}


@dataclass(frozen=True)
class LogicalParameter:
    shape: tuple[int, ...]
    cut: Cut = "whole"

    @property
    def is_split(self) -> bool:
        """Whether the ranks of a tensor-parallel group hold different parts of it."""
        return self.cut != "whole"


@cache
def logical_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Each tensor's public name and shape, in the order of ``logical_parameters``."""
    return MappingProxyType({name: parameter.shape for name, parameter in logical_parameters(config).items()})


@cache
def logical_parameters(config: ModelConfig) -> Mapping[str, LogicalParameter]:
    """Each tensor of the network by its public name, in the order of ``named_parameters()`` (the tests compare)."""
    found: dict[str, LogicalParameter] = {}

    def linear(name: str, inputs: int, outputs: int, cut: Cut = "whole") -> None:
        found[f"{name}.weight"] = LogicalParameter((outputs, inputs), cut)
        found[f"{name}.bias"] = LogicalParameter((outputs,), "whole" if cut == "columns" else cut)

    d, lora, into_mlp = config.hidden, config.adaln == "lora", INTO_MLP[config.mlp]
    linear("x_embedder.proj", config.token_channels, d)
    linear("t_embedder.mlp.0", TIMESTEP_CHANNELS, d)
    linear("t_embedder.mlp.2", d, d)
    found[CLASS_TABLE] = LogicalParameter((config.classes + 1, d))
    if lora:
        linear("global_adaLN_modulation.1", d, 6 * d)
    for block in (f"blocks.{i}" for i in range(config.depth)):
        if config.qk_norm == "l2_scale":
            found[f"{block}.attn.qk_scale"] = LogicalParameter((config.heads,), "rows")
        linear(f"{block}.attn.qkv", d, 3 * d, "rows_of_thirds")
        linear(f"{block}.attn.proj", d, d, "columns")
        for name in into_mlp:
            linear(f"{block}.mlp.{name}", d, config.mlp_hidden, "rows")
        linear(f"{block}.mlp.fc2", config.mlp_hidden, d, "columns")
        linear(f"{block}.adaLN_modulation.1", d, config.adaln_rank if lora else 6 * d)
        if lora:
            linear(f"{block}.adaLN_modulation.2", config.adaln_rank, 6 * d)
    linear("final_layer.linear", d, config.outputs * config.token_channels)
    linear("final_layer.adaLN_modulation.1", d, 2 * d)
    return MappingProxyType(found)


def matching(names: Iterable[str], patterns: Collection[str]) -> list[str]:
    """The names that one of the patterns of the config's ``trainable`` matches, in their order."""
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def trained_names(names: Iterable[str], trainable: Collection[str]) -> list[str]:
    """What ``matching`` gives. Raises UserError if that is nothing."""
    if not (trained := matching(names, trainable)):
        raise UserError(f"trainable: no tensor's name matches {trainable}; '*' trains all")
    return trained


def new_names(config: ModelConfig, patterns: Collection[str]) -> list[str]:
    """The tensors that the config's ``init_new`` names. Raises UserError for a pattern without any."""
    names = logical_shapes(config)
    for pattern in patterns:
        if not matching(names, [pattern]):
            raise UserError(f"init_new: no tensor's name matches {pattern}; that of the classes is {CLASS_TABLE}")
    return matching(names, patterns)


def parameter_count(config: ModelConfig, patterns: Collection[str] = ("*",)) -> int:
    """Of all tensors, or of those whose names a pattern matches, as in the config's ``trainable``."""
    shapes = logical_shapes(config)
    return sum(math.prod(shapes[name]) for name in matching(shapes, patterns))


def forward_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of one forward pass of one image of ``tokens`` tokens: two per multiply-add of a matrix product.

    Linears over tokens, attention's two products, and the conditioning once an image. Elementwise work is left out.
    A training step costs three times as much; recomputation and padding are not counted, as usual for MFU.
    """
    d, products = config.hidden, len(INTO_MLP[config.mlp]) + 1
    per_token_block = 4 * d * d + products * d * config.mlp_hidden + 2 * d * tokens
    per_token = config.depth * per_token_block + (1 + config.outputs) * d * config.token_channels
    if config.adaln == "lora":
        adaln = config.depth * (d + 6 * d) * config.adaln_rank + 6 * d * d
    else:
        adaln = config.depth * 6 * d * d
    per_image = adaln + TIMESTEP_CHANNELS * d + d * d + 2 * d * d
    return 2 * (tokens * per_token + per_image)
