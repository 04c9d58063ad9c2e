"""The networks of the published tables: ``model`` and ``objective`` of configs in configs/, by their names.

They are in this package because a job takes a copy of it along and not configs/; a test compares both. A file of one's
own, given by its path, is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from data_sharding.errors import UserError
from fitv2_scale.config.families import switches
from fitv2_scale.config.load import load_config
from fitv2_scale.config.model import ModelConfig, RopeConfig, SincosConfig


@dataclass(frozen=True)
class Network:
    """What decides which sampler a network needs."""

    model: ModelConfig
    objective: str


_B, _XL = {"depth": 12, "hidden": 768, "heads": 12}, {"depth": 28, "hidden": 1152, "heads": 16}
_V2_B, _V2_XL = {"depth": 15, "hidden": 768, "heads": 12}, {"depth": 36, "hidden": 1152, "heads": 16}
_V2_3B = {"depth": 40, "hidden": 2304, "heads": 24}
_DIT, _FIT = switches("DiT"), switches("FiT")  # SiT's are DiT's
_WITH_FLOW = _FIT | {"outputs": 1}
_HIGH_RESOLUTION = {"rope": RopeConfig(mode="vision_ntk")}


def _network(objective: str, *keys: Mapping[str, Any]) -> Network:
    return Network(ModelConfig(**{key: value for some in keys for key, value in some.items()}), objective)


PUBLISHED_NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "dit_b2": _network("ddpm", _B, _DIT),
        "dit_xl2": _network("ddpm", _XL, _DIT),
        "dit_xl2_512": _network("ddpm", _XL, _DIT, {"sincos": SincosConfig(train_side=32)}),
        "sit_b2": _network("flow", _B, _DIT),
        "sit_xl2": _network("flow", _XL, _DIT),
        "fit_b2": _network("ddpm", _B, _FIT),
        "fit_xl2": _network("ddpm", _XL, _FIT),
        "fitv2_b2": _network("flow", _V2_B),
        "fitv2_xl2": _network("flow", _V2_XL),
        "fitv2_3b2": _network("flow", _V2_3B),
        "fitv2_xl2_hr": _network("flow", _V2_XL, _HIGH_RESOLUTION),
        "fitv2_3b2_hr": _network("flow", _V2_3B, _HIGH_RESOLUTION),
        "ablation_a": _network("flow", _B, _WITH_FLOW),
        "ablation_b": _network("flow", _B, _WITH_FLOW, {"qk_norm": "layernorm"}),
        "ablation_c": _network("flow", _V2_B),
        "ablation_d": _network("flow", _B, _WITH_FLOW),
        "ablation_e": _network("flow", _B, _WITH_FLOW, {"qk_norm": "layernorm"}),
        "ablation_f": _network("flow", _B, _WITH_FLOW, {"qk_norm": "layernorm"}),
    }
)


@cache
def network_of(config: str) -> Network:
    """The network of a config, given by its name in configs/ or by the path of a .yaml file. Raises UserError."""
    if config.endswith((".yaml", ".yml")):
        found = load_config(config)
        return Network(found.model, found.objective)
    if config not in PUBLISHED_NETWORKS:
        raise UserError(
            f"there is no published network {config}: give the path of a .yaml file, or one of "
            f"{', '.join(PUBLISHED_NETWORKS)}"
        )
    return PUBLISHED_NETWORKS[config]
