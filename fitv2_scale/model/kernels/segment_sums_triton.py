"""``segment_sums`` in Triton. Imported only where there is Triton, which CUDA builds of torch bring.

A program sums a block of channels over the tokens of one image, in a fixed order: the bits are the same each time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = {"BLOCK_T": 32, "BLOCK_D": 64}  # tokens and channels that a program reads at once


@triton.jit
def sums(a, b, mean, rstd, cu_seqlens, out, channels, NORM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row ``i`` of ``out``: the sums of a times b over image i; with NORM those of a, then of a times normalised b."""
    image = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, end = tl.load(cu_seqlens + image), tl.load(cu_seqlens + image + 1)
    plain, product = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, end, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        place = token[:, None].to(tl.int64) * channels + channel[None, :]
        inside = (token < end)[:, None] & (channel < channels)[None, :]
        left = tl.load(a + place, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(b + place, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            plain += tl.sum(left, 0)
            right -= tl.load(mean + token, mask=token < end, other=0.0)[:, None]
            right *= tl.load(rstd + token, mask=token < end, other=0.0)[:, None]
        product += tl.sum(left * right, 0)
    if NORM:
        row = out + image * 2 * channels
        tl.store(row + channel, plain, mask=channel < channels)
        tl.store(row + channels + channel, product, mask=channel < channels)
    else:
        tl.store(out + image * channels + channel, product, mask=channel < channels)


def norm_sums(grad_TD: Tensor, x_TD: Tensor, mean_T: Tensor, rstd_T: Tensor, cu_seqlens_I1: Tensor) -> Tensor:
    return _launch(grad_TD, x_TD, (mean_T.contiguous(), rstd_T.contiguous()), cu_seqlens_I1)


def product_sums(a_TD: Tensor, b_TD: Tensor, cu_seqlens_I1: Tensor) -> Tensor:
    return _launch(a_TD, b_TD, None, cu_seqlens_I1)


def _launch(a_TD: Tensor, b_TD: Tensor, norm: tuple[Tensor, Tensor] | None, cu_seqlens_I1: Tensor) -> Tensor:
    images, channels = cu_seqlens_I1.shape[0] - 1, b_TD.shape[1]
    out = torch.empty(images, channels * (2 if norm else 1), dtype=torch.float32, device=b_TD.device)
    mean, rstd = norm or (out, out)  # not read
    grid = images, triton.cdiv(channels, BLOCKS["BLOCK_D"])
    a, b = a_TD.contiguous(), b_TD.contiguous()
    constants: Any = {"NORM": norm is not None, **BLOCKS}
    sums[grid](a, b, mean, rstd, cu_seqlens_I1, out, channels, **constants)
    return out
