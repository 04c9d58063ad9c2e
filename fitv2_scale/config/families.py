"""The published families of networks, each a row of switches of ``model`` and an objective, and the names of sizes.

FiTv2-B/2    family, size, patch; a size that no paper has is depth x hidden, as in DiT-6x160/2
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from fitv2_scale.config.model import ModelConfig

OTHER = "other"
_BEFORE_FITV2 = {"qk_norm": "none", "adaln": "full", "outputs": 2}
# SiT has a second half of output, as DiT, and drops it. Times, views and dropout of a run may differ within a family.
FAMILIES: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "FiTv2": {"objective": "flow", "mlp": "swiglu", "position": "rope", "qk_norm": "layernorm", "adaln": "lora",
              "outputs": 1},
    "FiT": {"objective": "ddpm", "mlp": "swiglu_4d", "position": "rope", **_BEFORE_FITV2},
    "DiT": {"objective": "ddpm", "mlp": "gelu", "position": "sincos", **_BEFORE_FITV2},
    "SiT": {"objective": "flow", "mlp": "gelu", "position": "sincos", **_BEFORE_FITV2},
})  # fmt: skip
_OF_DIT = {(12, 384): "S", (12, 768): "B", (24, 1024): "L", (28, 1152): "XL"}
SIZES: Mapping[str, Mapping[tuple[int, int], str]] = MappingProxyType({
    "FiTv2": {(15, 384): "S", (15, 768): "B", (28, 1024): "L", (36, 1152): "XL", (40, 2304): "3B"},
    "FiT": _OF_DIT, "DiT": _OF_DIT, "SiT": _OF_DIT, OTHER: {},
})  # fmt: skip


def family_of(model: ModelConfig, objective: str) -> str:
    """FiTv2, FiT, DiT or SiT; "other" if a switch differs from all of them."""
    found = {"objective": objective} | model.model_dump()
    matching = (name for name, switches in FAMILIES.items() if all(found[key] == v for key, v in switches.items()))
    return next(matching, OTHER)


def network_name(model: ModelConfig, objective: str) -> str:
    """As FiTv2-B/2."""
    family, shape = family_of(model, objective), (model.depth, model.hidden)
    return f"{family}-{SIZES[family].get(shape, f'{model.depth}x{model.hidden}')}/{model.patch}"


def switches(family: str) -> dict[str, Any]:
    """Of the section ``model``."""
    return {key: value for key, value in FAMILIES[family].items() if key != "objective"}


def published_model(family: Literal["FiTv2", "FiT", "DiT", "SiT"], depth: int, hidden: int, heads: int) -> ModelConfig:
    """A network of a family for ImageNet's classes, of patches of 2."""
    return ModelConfig(depth=depth, hidden=hidden, heads=heads, classes=1000, **switches(family))
