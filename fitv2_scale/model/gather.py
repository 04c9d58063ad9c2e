"""Gathers what is computed once per image to the image's tokens."""

from typing import Any

import torch
from torch import Tensor


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_IK: Tensor, image_T: Tensor) -> Tensor:
        ctx.save_for_backward(image_T)
        ctx.images = x_IK.shape[0]
        return x_IK.index_select(0, image_T)

    @staticmethod
    # Autograd calls it with one gradient for each output; torch's annotation leaves their number open.
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        (image_T,) = ctx.saved_tensors
        belongs_IT = torch.arange(ctx.images, device=image_T.device)[:, None] == image_T
        return belongs_IT.to(grad_TK.dtype) @ grad_TK, None


def to_tokens(x_IK: Tensor, image_T: Tensor) -> Tensor:
    """Row ``image_T[t]`` of ``x_IK`` for each token t: (T, K).

    The gradient is a product with a matrix of zeros and ones. That of index_select adds token by token into few rows:
    on CUDA with atomic additions, in bf16 with rounding at each, and in an order that differs from run to run. A
    product adds in float32, in a fixed order, and costs 2 I FLOPs per element, well under a hundredth of a block.
    """
    return _ToTokens.apply(x_IK, image_T)
