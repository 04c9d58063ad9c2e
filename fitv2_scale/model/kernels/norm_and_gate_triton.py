"""``gate_backward``, ``norm_backward`` and ``join_backward`` in Triton: one kernel of which each uses a part.

A program goes through up to CHUNK tokens of one image, one after the other, each as a whole row, and keeps their sums
in registers. The order is fixed: the bits are the same each time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fitv2_scale.model.kernels.operators import CHUNK, chunks
from fitv2_scale.model.modulation import NORM_EPS


@triton.jit
def backward(
    grad, grad_m, x, y, scale, gate, cu_seqlens, grad_x, grad_y, sums, channels, scale_row, gate_row,
    NORM: tl.constexpr, GATE: tl.constexpr, CHUNK: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """With NORM the part of the norm, with GATE that of the gate; sums are (I, chunks, 2 or 4 D)."""
    image, chunk = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, BLOCK_D)
    inside = channel < channels
    first = tl.load(cu_seqlens + image) + chunk * CHUNK
    end = tl.minimum(tl.load(cu_seqlens + image + 1), first + CHUNK)
    of_shift, of_scale = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    of_grad, of_gate = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    factor = 1 + tl.load(scale + image * scale_row + channel, mask=inside & NORM, other=0.0).to(tl.float32)
    gated = tl.load(gate + image * gate_row + channel, mask=inside & GATE, other=0.0).to(tl.float32)
    for step in range(end - first):
        row = (first + step).to(tl.int64) * channels + channel
        total = tl.load(grad + row, mask=inside, other=0.0).to(tl.float32)
        branch = tl.load(y + row, mask=inside & GATE, other=0.0).to(tl.float32)
        if NORM:
            value = tl.load(x + row, mask=inside, other=0.0).to(tl.float32) + gated * branch
            centred = tl.where(inside, value - tl.sum(value, 0) / channels, 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 0) / channels + EPS)
            normed = centred * rstd
            inner = tl.load(grad_m + row, mask=inside, other=0.0).to(tl.float32)
            of_shift += inner
            of_scale += inner * normed
            inner *= factor
            total += rstd * (inner - tl.sum(inner, 0) / channels - normed * (tl.sum(inner * normed, 0) / channels))
            tl.store(grad_x + row, total, mask=inside)
        if GATE:
            tl.store(grad_y + row, gated * total, mask=inside)
            of_grad += total
            of_gate += total * branch
    out = sums + (image * tl.num_programs(1) + chunk).to(tl.int64) * channels * (4 if NORM and GATE else 2) + channel
    if NORM:
        tl.store(out, of_shift, mask=inside)
        tl.store(out + channels, of_scale, mask=inside)
        out += 2 * channels
    if GATE:
        tl.store(out, of_grad, mask=inside)
        tl.store(out + channels, of_gate, mask=inside)


def blocks(channels: int) -> dict[str, Any]:
    """How a row of so many channels is cut up: four for each thread, so that a multiprocessor has many of them."""
    width: Any = triton.next_power_of_2(channels)
    return {"BLOCK_D": width, "num_warps": min(max(width // 128, 1), 32)}


def gate_backward(
    grad_TD: Tensor, y_TD: Tensor, gate_ID: Tensor, cu_seqlens_I1: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    _, grad_y, sums = _launch(grad_TD, None, (y_TD, gate_ID), cu_seqlens_I1, longest)
    return grad_y, sums


def norm_backward(
    grad_x_TD: Tensor, grad_m_TD: Tensor, x_TD: Tensor, scale_ID: Tensor, cu_seqlens_I1: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    grad_x, _, sums = _launch(grad_x_TD, (grad_m_TD, x_TD, scale_ID), None, cu_seqlens_I1, longest)
    return grad_x, sums


def join_backward(
    grad_x_TD: Tensor,
    grad_m_TD: Tensor,
    x_TD: Tensor,
    y_TD: Tensor,
    gate_ID: Tensor,
    scale_ID: Tensor,
    cu_seqlens_I1: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch(grad_x_TD, (grad_m_TD, x_TD, scale_ID), (y_TD, gate_ID), cu_seqlens_I1, longest)


def _launch(
    grad_TD: Tensor,
    norm: tuple[Tensor, Tensor, Tensor] | None,
    gate: tuple[Tensor, Tensor] | None,
    cu_seqlens_I1: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and y (that of what is left out is ``grad_TD``), and the sums."""
    grad, images, channels = grad_TD.contiguous(), cu_seqlens_I1.shape[0] - 1, grad_TD.shape[1]
    grad_m, x, scale = norm or (grad, grad, grad)  # a place that the kernel does not read has any tensor
    y, gated = gate or (grad, grad)
    grad_m, x, y = grad_m.contiguous(), x.contiguous(), y.contiguous()
    scale, gated = (values if values.stride(1) == 1 else values.contiguous() for values in (scale, gated))
    grad_x = torch.empty_like(x) if norm else grad
    grad_y = torch.empty_like(y) if gate else grad
    shape = images, chunks(longest), channels * (4 if norm and gate else 2)
    sums = torch.empty(shape, dtype=torch.float32, device=grad.device)
    constants: Any = {"NORM": norm is not None, "GATE": gate is not None, "CHUNK": CHUNK, "EPS": NORM_EPS}
    backward[images, chunks(longest)](
        grad, grad_m, x, y, scale, gated, cu_seqlens_I1, grad_x, grad_y, sums, channels, scale.stride(0),
        gated.stride(0), **constants, **blocks(channels),
    )  # fmt: skip
    return grad_x, grad_y, sums
