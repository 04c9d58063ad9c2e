"""AdaLN's shifts, scales and gates, which are computed once per image, applied to the image's tokens.

Two ways that give the same: ``Gathered`` copies each image's values to its tokens, in plain operators that a compiler
fuses with their neighbours. ``ByImage`` goes from image to image, where the host knows how long each is: on a CPU,
where nothing is compiled, no copy of (T, 6 D) numbers is written, read and summed again.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fitv2_scale.model.gather import to_tokens
from fitv2_scale.model.packed_batch import Packing

NORM_EPS = 1e-6


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def modulated(x_TD: Tensor, shift_TD: Tensor, scale_TD: Tensor) -> Tensor:
    """layer_norm(x) (1 + scale) + shift."""
    return layer_norm(x_TD) * (1 + scale_TD) + shift_TD


class Modulation(Protocol):
    """``parts`` values of D channels for each image; ``shift``, ``scale`` and ``gate`` number them."""

    def modulate(self, x_TD: Tensor, shift: int, scale: int) -> Tensor:
        """layer_norm(x) (1 + scale) + shift."""
        ...

    def add_gated(self, x_TD: Tensor, y_TD: Tensor, gate: int) -> Tensor:
        """x + gate y."""
        ...


def modulation(values_IK: Tensor, parts: int, packing: Packing) -> Modulation:
    """K = ``parts`` D."""
    return (ByImage if packing.knows_lengths else Gathered)(values_IK, parts, packing)


class Gathered:
    def __init__(self, values_IK: Tensor, parts: int, packing: Packing):
        self._parts = to_tokens(values_IK, packing.image_T).chunk(parts, -1)

    def modulate(self, x_TD: Tensor, shift: int, scale: int) -> Tensor:
        return modulated(x_TD, self._parts[shift], self._parts[scale])

    def add_gated(self, x_TD: Tensor, y_TD: Tensor, gate: int) -> Tensor:
        return x_TD + self._parts[gate] * y_TD


class ByImage:
    def __init__(self, values_IK: Tensor, parts: int, packing: Packing):
        self._parts, self._lengths = values_IK.chunk(parts, -1), packing.lengths

    def modulate(self, x_TD: Tensor, shift: int, scale: int) -> Tensor:
        return _Modulate.apply(layer_norm(x_TD), self._parts[shift], self._parts[scale], self._lengths)

    def add_gated(self, x_TD: Tensor, y_TD: Tensor, gate: int) -> Tensor:
        return _AddGated.apply(x_TD, y_TD, self._parts[gate], self._lengths)


class _Modulate(torch.autograd.Function):
    """x (1 + scale) + shift."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, shift_ID: Tensor, scale_ID: Tensor, lengths: Sequence[int]) -> Tensor:
        factor_ID, out_TD = 1 + scale_ID, torch.empty_like(x_TD)
        for image, x, out in _images(lengths, x_TD, out_TD):
            torch.mul(x, factor_ID[image], out=out).add_(shift_ID[image])
        ctx.save_for_backward(x_TD, factor_ID)
        ctx.lengths = lengths
        return out_TD

    @staticmethod
    # Autograd calls it with one gradient for each output; torch's annotation leaves their number open.
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyrefly: ignore[bad-override]
        x_TD, factor_ID = ctx.saved_tensors
        grad_x_TD, shift_ID, scale_ID = torch.empty_like(x_TD), torch.zeros_like(factor_ID), torch.zeros_like(factor_ID)
        for image, x, grad, grad_x in _images(ctx.lengths, x_TD, grad_TD, grad_x_TD):
            torch.sum(grad, 0, out=shift_ID[image])
            torch.sum(torch.mul(grad, x, out=grad_x), 0, out=scale_ID[image])
            torch.mul(grad, factor_ID[image], out=grad_x)
        return grad_x_TD, shift_ID, scale_ID, None


class _AddGated(torch.autograd.Function):
    """x + gate y."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, y_TD: Tensor, gate_ID: Tensor, lengths: Sequence[int]) -> Tensor:
        out_TD = torch.empty_like(x_TD)
        for image, x, y, out in _images(lengths, x_TD, y_TD, out_TD):
            torch.mul(y, gate_ID[image], out=out).add_(x)
        ctx.save_for_backward(y_TD, gate_ID)
        ctx.lengths = lengths
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyrefly: ignore[bad-override]
        y_TD, gate_ID = ctx.saved_tensors
        grad_y_TD, grad_gate_ID = torch.empty_like(y_TD), torch.zeros_like(gate_ID)
        for image, y, grad, grad_y in _images(ctx.lengths, y_TD, grad_TD, grad_y_TD):
            torch.sum(torch.mul(grad, y, out=grad_y), 0, out=grad_gate_ID[image])
            torch.mul(grad, gate_ID[image], out=grad_y)
        return grad_TD, grad_y_TD, grad_gate_ID, None


def _images(lengths: Sequence[int], *tensors: Tensor) -> Iterator[tuple]:
    """The number of each image, and its tokens in each of ``tensors``; images without tokens are left out."""
    for image, rows in enumerate(zip(*(tensor.split(lengths) for tensor in tensors), strict=True)):
        if lengths[image]:
            yield image, *rows
