"""Attention inside each image of a packed batch: one function, three kernels that are tested against each other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fitv2_scale.model.packed_batch import Packing

_VARLEN_DTYPES = (torch.bfloat16, torch.float16)  # what the flash kernel takes


def attention(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, packing: Packing) -> Tensor:
    """Softmax attention of each token to its own image's tokens, scaled by head_dim ** -0.5: (T, H, D)."""
    if has_varlen(q_THD):
        return _varlen(q_THD, k_THD, v_THD, packing)
    if packing.knows_lengths:
        return by_image(q_THD, k_THD, v_THD, packing)
    return padded_sdpa(q_THD, k_THD, v_THD, packing)


def has_varlen(x: Tensor) -> bool:
    """Whether there is a varlen kernel for the device and the dtype of ``x``."""
    return x.is_cuda and x.dtype in _VARLEN_DTYPES


def _varlen(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = packing.cu_seqlens_I1, packing.max_seqlen
    # A pair only with the log-sum-exp, which torch's annotation does not tell apart.
    return varlen_attn(q_THD, k_THD, v_THD, cu, cu, longest, longest)  # pyrefly: ignore[bad-return]


def by_image(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, packing: Packing) -> Tensor:
    """The same by SDPA over one image after the other, where the host knows their lengths: nothing is padded, and q, k
    and v are not copied. A CPU has enough to do with one image."""
    lengths = [tokens for tokens in packing.lengths if tokens]
    images = zip(*(x_THD.transpose(0, 1)[None].split(lengths, 2) for x_THD in (q_THD, k_THD, v_THD)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*image)[0].transpose(0, 1) for image in images])


def padded_sdpa(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, packing: Packing) -> Tensor:
    """The same by SDPA over images padded to the longest: far less work than one (T, T) mask."""
    token_P, place_T, key_mask = packing.padded
    images, (heads, dim) = packing.cu_seqlens_I1.numel() - 1, q_THD.shape[1:]

    def pad(x_THD: Tensor) -> Tensor:
        return x_THD.flatten(1).index_select(0, token_P).view(images, -1, heads, dim).transpose(1, 2)

    out_IHLD = F.scaled_dot_product_attention(pad(q_THD), pad(k_THD), pad(v_THD), attn_mask=key_mask)
    return out_IHLD.transpose(1, 2).flatten(0, 1).flatten(1).index_select(0, place_T).view(-1, heads, dim)
