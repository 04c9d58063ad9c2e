"""What makes the linears of a network: plain ones, or those of a tensor-parallel group."""

from collections.abc import Callable
from typing import Literal

from torch import nn

Role = Literal["column", "row", "replicated"]
LinearFactory = Callable[[int, int, Role], nn.Module]


def plain_linear(in_features: int, out_features: int, role: Role) -> nn.Module:
    """The factory at tensor = 1. It ignores ``role``, which says how a tensor-parallel group splits the weight."""
    return nn.Linear(in_features, out_features)
