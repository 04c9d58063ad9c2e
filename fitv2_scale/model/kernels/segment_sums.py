"""The gradients of modulation vectors, which all tokens of an image share: sums over the tokens of each image.

Operators of torch, so that the compiler leaves them whole. On CUDA each is a kernel written in Triton
(``segment_sums_triton``), elsewhere the same in plain torch. T tokens, I image slots, D channels.
"""

import torch
from torch import Tensor, library


@library.custom_op("fitv2_scale::norm_sums", mutates_args=())
def norm_sums(grad_TD: Tensor, x_TD: Tensor, mean_T: Tensor, rstd_T: Tensor, cu_seqlens_I1: Tensor) -> Tensor:
    """Over each image's tokens, the sums of ``grad_TD``, then of its product with the normalised x, which is
    (x - mean) * rstd: float32 (I, 2 D), zero for a slot without tokens."""
    normed_TD = (x_TD.float() - mean_T[:, None]) * rstd_T[:, None]
    both = torch.cat((grad_TD.float(), grad_TD.float() * normed_TD), -1)
    return _sums(both, cu_seqlens_I1)


@library.custom_op("fitv2_scale::product_sums", mutates_args=())
def product_sums(a_TD: Tensor, b_TD: Tensor, cu_seqlens_I1: Tensor) -> Tensor:
    """Over each image's tokens, the sums of a times b: float32 (I, D), zero for a slot without tokens."""
    return _sums(a_TD.float() * b_TD.float(), cu_seqlens_I1)


def _sums(x_TD: Tensor, cu_seqlens_I1: Tensor) -> Tensor:
    token_T = torch.arange(x_TD.shape[0], device=x_TD.device)
    first, last = cu_seqlens_I1[:-1, None], cu_seqlens_I1[1:, None]
    return ((first <= token_T) & (token_T < last)).float() @ x_TD


@norm_sums.register_fake
def _(grad_TD: Tensor, x_TD: Tensor, mean_T: Tensor, rstd_T: Tensor, cu_seqlens_I1: Tensor) -> Tensor:
    return x_TD.new_empty(cu_seqlens_I1.shape[0] - 1, 2 * x_TD.shape[1], dtype=torch.float32)


@product_sums.register_fake
def _(a_TD: Tensor, b_TD: Tensor, cu_seqlens_I1: Tensor) -> Tensor:
    return b_TD.new_empty(cu_seqlens_I1.shape[0] - 1, b_TD.shape[1], dtype=torch.float32)


@norm_sums.register_kernel("cuda")
def _(grad_TD: Tensor, x_TD: Tensor, mean_T: Tensor, rstd_T: Tensor, cu_seqlens_I1: Tensor) -> Tensor:
    from fitv2_scale.model.kernels import segment_sums_triton

    return segment_sums_triton.norm_sums(grad_TD, x_TD, mean_T, rstd_T, cu_seqlens_I1)


@product_sums.register_kernel("cuda")
def _(a_TD: Tensor, b_TD: Tensor, cu_seqlens_I1: Tensor) -> Tensor:
    from fitv2_scale.model.kernels import segment_sums_triton

    return segment_sums_triton.product_sums(a_TD, b_TD, cu_seqlens_I1)
