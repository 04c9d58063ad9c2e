"""AdaLN's values applied to tokens, with gradients that are summed over each image's tokens by written kernels."""

from typing import Any

import torch
from torch import Tensor

from fitv2_scale.model.kernels.segment_sums import norm_sums, product_sums
from fitv2_scale.model.modulation import NORM_EPS, layer_norm
from fitv2_scale.model.packed_batch import Packing


class Summed:
    """As ``modulation.Gathered``, but no gradient of a value is written out for each token: a kernel reads what it is
    made of. Only the backward pass has such kernels, so that the compiler fuses the rest as before."""

    def __init__(self, values_IK: Tensor, parts: int, packing: Packing):
        self._parts = values_IK.chunk(parts, -1)
        self._image_T, self._cu_seqlens_I1 = packing.image_T, packing.cu_seqlens_I1

    def modulate(self, x_TD: Tensor, shift: int, scale: int) -> Tensor:
        return _Modulate.apply(x_TD, self._parts[shift], self._parts[scale], self._image_T, self._cu_seqlens_I1)

    def add_gated(self, x_TD: Tensor, y_TD: Tensor, gate: int) -> Tensor:
        return _AddGated.apply(x_TD, y_TD, self._parts[gate], self._image_T, self._cu_seqlens_I1)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, shift_ID: Tensor, scale_ID: Tensor, image_T: Tensor, cu_seqlens_I1: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_TD, scale_ID, image_T, cu_seqlens_I1)
        return layer_norm(x_TD) * (1 + scale_ID.index_select(0, image_T)) + shift_ID.index_select(0, image_T)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x_TD, scale_ID, image_T, cu_seqlens_I1 = ctx.saved_tensors
        x = x_TD.float()
        variance_T1, mean_T1 = torch.var_mean(x, -1, correction=0, keepdim=True)
        rstd_T1 = (variance_T1 + NORM_EPS).rsqrt()
        sums = norm_sums(grad_TD, x_TD, mean_T1[:, 0], rstd_T1[:, 0], cu_seqlens_I1)
        normed = (x - mean_T1) * rstd_T1
        grad = grad_TD.float() * (1 + scale_ID.index_select(0, image_T).float())
        along = (grad * normed).mean(-1, keepdim=True)
        grad_x = rstd_T1 * (grad - grad.mean(-1, keepdim=True) - normed * along)
        return grad_x.to(x_TD.dtype), *sums.to(scale_ID.dtype).chunk(2, -1), None, None


class _AddGated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, y_TD: Tensor, gate_ID: Tensor, image_T: Tensor, cu_seqlens_I1: Tensor
    ) -> Tensor:
        ctx.save_for_backward(gate_ID, y_TD, image_T, cu_seqlens_I1)
        return x_TD + gate_ID.index_select(0, image_T) * y_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        gate_ID, y_TD, image_T, cu_seqlens_I1 = ctx.saved_tensors
        grad_y = grad_TD * gate_ID.index_select(0, image_T)
        return grad_TD, grad_y, product_sums(grad_TD, y_TD, cu_seqlens_I1).to(gate_ID.dtype), None, None
