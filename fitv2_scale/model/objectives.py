"""The objectives by the name that ``objective`` gives them."""

from collections.abc import Callable

import torch

from fitv2_scale.config.schema import Config
from fitv2_scale.model.ddpm import Ddpm
from fitv2_scale.model.flow import Flow
from fitv2_scale.model.objective import Objective

_OBJECTIVES: dict[str, Callable[[Config, torch.device], Objective]] = {
    "flow": lambda config, device: Flow(config.flow, config.model.classes, config.seed),
    "ddpm": lambda config, device: Ddpm(config.ddpm, config.model.classes, config.seed, device),
}


def make_objective(config: Config, device: torch.device) -> Objective:
    """The objective of ``config``, for batches on ``device``."""
    return _OBJECTIVES[config.objective](config, device)
