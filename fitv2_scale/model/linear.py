"""What makes the linears of a network: plain ones, or those of a tensor-parallel group."""

from collections.abc import Callable, Sequence
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
    first, weight, bias = _joined(linears)
    return first.product(x, weight, bias).chunk(len(linears), -1)


def with_bias_apart(x: Tensor, *linears: nn.Module) -> tuple[Tensor, Tensor]:
    """What ``linears``, as for ``merged``, make of ``x``, side by side, and their biases, to which no gradient comes
    from that: the caller gives them one."""
    first, weight, bias = _joined(linears)
    return first.product(x, weight, bias.detach()), bias


def _joined(linears: Sequence[nn.Module]) -> tuple[_Products, Tensor, Tensor]:
    """The first of ``linears``, and the weights and biases of all; of one alone they are not copied."""
    parts = [cast(_Products, linear) for linear in linears]
    if len(parts) == 1:
        return parts[0], parts[0].weight, parts[0].bias
    return parts[0], torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
