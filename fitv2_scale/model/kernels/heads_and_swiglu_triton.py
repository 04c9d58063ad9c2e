"""``heads_backward`` and ``swiglu_backward`` in Triton.

A program goes through CHUNK tokens of the pack, a few at a time, for one head or some channels, and keeps their sums in
registers. The order is fixed: the bits are the same each time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fitv2_scale.model.kernels.operators import CHUNK, chunks
from fitv2_scale.model.modulation import NORM_EPS

BLOCK_T = 16  # tokens that a program reads at once
SWIGLU = {"BLOCK_T": BLOCK_T, "BLOCK_C": 128, "num_warps": 8}


@triton.jit
def heads(
    grad_q, grad_k, grad_v, qkv, cos, sin, out, sums, tokens, heads,
    DIM: tl.constexpr, NORM: tl.constexpr, CHUNK: tl.constexpr, EPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The program's second number counts the heads of q, then those of k and of v, as they lie in ``qkv``."""
    chunk, column = tl.program_id(0), tl.program_id(1)
    part, head = column // heads, column % heads
    channel = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, CHUNK, BLOCK_T):
        token = chunk * CHUNK + start + tl.arange(0, BLOCK_T)
        inside = (token < tokens)[:, None] & (channel < DIM)[None, :]
        row = token[:, None].to(tl.int64)
        place = row * heads * DIM + head * DIM
        whole = row * 3 * heads * DIM + column * DIM + channel[None, :]
        if part == 2:
            grad = tl.load(grad_v + place + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        else:
            other = channel[None, :] ^ 1  # the channel that it was rotated with
            if part == 0:
                grad = tl.load(grad_q + place + channel[None, :], mask=inside, other=0.0).to(tl.float32)
                along = tl.load(grad_q + place + other, mask=inside, other=0.0).to(tl.float32)
            else:
                grad = tl.load(grad_k + place + channel[None, :], mask=inside, other=0.0).to(tl.float32)
                along = tl.load(grad_k + place + other, mask=inside, other=0.0).to(tl.float32)
            grad *= tl.load(cos + row * DIM + channel[None, :], mask=inside, other=0.0)
            grad += along * tl.load(sin + row * DIM + other, mask=inside, other=0.0)
            if NORM:
                x = tl.load(qkv + whole, mask=inside, other=0.0).to(tl.float32)
                centred = tl.where(inside, x - tl.sum(x, 1)[:, None] / DIM, 0.0)
                rstd = tl.rsqrt(tl.sum(centred * centred, 1) / DIM + EPS)[:, None]
                normed = centred * rstd
                along_normed = tl.sum(grad * normed, 1)[:, None] / DIM
                grad = tl.where(inside, rstd * (grad - tl.sum(grad, 1)[:, None] / DIM - normed * along_normed), 0.0)
        tl.store(out + whole, grad, mask=inside)
        total += tl.sum(grad, 0)
    row_of_sums = sums + chunk.to(tl.int64) * 3 * heads * DIM
    tl.store(row_of_sums + column * DIM + channel, total, mask=channel < DIM)


@triton.jit
def swiglu(
    grad, gate, value, out, sums, tokens, width, gate_row, value_row,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    of_gate, of_value = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, CHUNK, BLOCK_T):
        token = chunk * CHUNK + start + tl.arange(0, BLOCK_T)
        inside = (token < tokens)[:, None] & (channel < width)[None, :]
        row = token[:, None].to(tl.int64)
        g = tl.load(grad + row * width + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(gate + row * gate_row + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        v = tl.load(value + row * value_row + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(x)
        grad_gate = g * v * sigmoid * (1 + x * (1 - sigmoid))
        grad_value = g * x * sigmoid
        place = out + row * 2 * width + channel[None, :]
        tl.store(place, grad_gate, mask=inside)
        tl.store(place + width, grad_value, mask=inside)
        of_gate += tl.sum(grad_gate, 0)
        of_value += tl.sum(grad_value, 0)
    place_of_sums = sums + chunk.to(tl.int64) * 2 * width + channel
    tl.store(place_of_sums, of_gate, mask=channel < width)
    tl.store(place_of_sums + width, of_value, mask=channel < width)


def swiglu_backward(grad_TH: Tensor, gate_TH: Tensor, value_TH: Tensor) -> tuple[Tensor, Tensor]:
    grad, (tokens, width) = grad_TH.contiguous(), grad_TH.shape
    gate, value = (x if x.stride(1) == 1 else x.contiguous() for x in (gate_TH, value_TH))
    out = torch.empty(tokens, 2 * width, dtype=grad.dtype, device=grad.device)
    sums = torch.empty(chunks(tokens), 2 * width, dtype=torch.float32, device=grad.device)
    constants: Any = {"CHUNK": CHUNK, **SWIGLU}
    grid = chunks(tokens), triton.cdiv(width, SWIGLU["BLOCK_C"])
    swiglu[grid](grad, gate, value, out, sums, tokens, width, gate.stride(0), value.stride(0), **constants)
    return out, sums


def heads_backward(
    grad_q_THD: Tensor,
    grad_k_THD: Tensor,
    grad_v_THD: Tensor,
    qkv_TK: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    norm: bool,
) -> tuple[Tensor, Tensor]:
    tokens, of_part, dim = grad_q_THD.shape
    grad_q, grad_k, grad_v = (grad.contiguous() for grad in (grad_q_THD, grad_k_THD, grad_v_THD))
    out = torch.empty(qkv_TK.shape, dtype=qkv_TK.dtype, device=qkv_TK.device)
    sums = torch.empty(chunks(tokens), 3 * of_part * dim, dtype=torch.float32, device=out.device)
    constants: Any = {"DIM": dim, "NORM": norm, "CHUNK": CHUNK, "EPS": NORM_EPS, **blocks_of_head(dim)}
    heads[chunks(tokens), 3 * of_part](
        grad_q, grad_k, grad_v, qkv_TK.contiguous(), cos_TD.contiguous(), sin_TD.contiguous(), out, sums, tokens,
        of_part, **constants,
    )  # fmt: skip
    return out, sums


def blocks_of_head(dim: int) -> dict[str, Any]:
    return {"BLOCK_T": BLOCK_T, "BLOCK_C": triton.next_power_of_2(dim)}
