"""What makes the linears of a network: plain ones, or those of a tensor-parallel group."""

from collections.abc import Callable
from typing import Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Role = Literal["column", "row", "replicated"]
LinearFactory = Callable[[int, int, Role], nn.Module]


class Linear(nn.Linear):
    def product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """As ``forward``, with other weights."""
        return F.linear(x, weight, bias)


class _Products(Protocol):
    weight: Tensor
    bias: Tensor

    def product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor: ...


def plain_linear(in_features: int, out_features: int, role: Role) -> nn.Module:
    """The factory at tensor = 1. It ignores ``role``, which says how a tensor-parallel group splits the weight."""
    return Linear(in_features, out_features)


def merged(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """What each of ``linears``, equal in size and of the role ``column``, makes of ``x``: by one product."""
    both, _ = _merged(x, False, *linears)
    return both.chunk(len(linears), -1)


def with_bias_apart(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What ``linear`` makes of ``x``, and its bias, to which no gradient comes from that: the caller gives it one."""
    part = cast(_Products, linear)
    return part.product(x, part.weight, part.bias.detach()), part.bias


def merged_with_bias_apart(x: Tensor, *linears: nn.Module) -> tuple[Tensor, Tensor]:
    """As ``merged``, side by side, and the biases likewise, to which no gradient comes from that."""
    return _merged(x, True, *linears)


def _merged(x: Tensor, detached: bool, *linears: nn.Module) -> tuple[Tensor, Tensor]:
    parts = [cast(_Products, linear) for linear in linears]
    weight, bias = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
    return parts[0].product(x, weight, bias.detach() if detached else bias), bias
