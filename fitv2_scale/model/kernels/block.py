"""A block whose backward pass outside of products and attention is operators with kernels of their own.

The forward pass is the plain formulas, which the compiler fuses as before. A bias is added where its product is
computed, but detached: its gradient is a sum over what an operator of the next stage writes, and so comes from there.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fitv2_scale.model.attention import attention
from fitv2_scale.model.block import Attention, Block, GeluMLP, Rope, SwiGLU
from fitv2_scale.model.kernels import on_cuda, operators
from fitv2_scale.model.linear import with_bias_apart
from fitv2_scale.model.modulation import layer_norm, modulated
from fitv2_scale.model.packed_batch import Packing
from fitv2_scale.model.rope import rotate

on_cuda.register()


class FusedAttention(Attention):
    def heads(self, x_TD: Tensor, rope_TD: Rope) -> tuple[Tensor, Tensor, Tensor]:
        if self.qk_norm == "l2_scale" or rope_TD is None:
            return super().heads(x_TD, rope_TD)
        qkv_TK, bias_K = with_bias_apart(x_TD, self.qkv)
        return _Heads.apply(qkv_TK, bias_K, *rope_TD, self.head_dim, self.qk_norm == "layernorm")

    def inner(self, x_TD: Tensor, rope_TD: Rope, packing: Packing) -> tuple[Tensor, Tensor]:
        """As ``forward``, with the bias whose gradient is still to be given."""
        out_THD = attention(*self.heads(x_TD, rope_TD), packing)
        return with_bias_apart(out_THD.flatten(1), self.proj)


class FusedSwiGLU(SwiGLU):
    def inner(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        gate_TH, bias_gate_H = with_bias_apart(x_TD, self.fc1_g)
        value_TH, bias_value_H = with_bias_apart(x_TD, self.fc1_x)
        hidden_TH = _SwiGLU.apply(torch.cat((bias_gate_H, bias_value_H)), gate_TH, value_TH)
        return with_bias_apart(hidden_TH, self.fc2)


class FusedMergedSwiGLU(FusedSwiGLU):
    def inner(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        both_T2H, bias_2H = with_bias_apart(x_TD, self.fc1_g, self.fc1_x)
        hidden_TH = _SwiGLU.apply(bias_2H, both_T2H)
        return with_bias_apart(hidden_TH, self.fc2)


class FusedGeluMLP(GeluMLP):
    """Its own backward pass is the compiler's."""

    def inner(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        return with_bias_apart(F.gelu(self.fc1(x_TD), approximate="tanh"), self.fc2)


class FusedBlock(Block):
    def apply_modulated(self, x_TD: Tensor, modulation_I6D: Tensor, rope_TD: Rope, packing: Packing) -> Tensor:
        shift, scale, gate, shift_of_mlp, scale_of_mlp, gate_of_mlp = modulation_I6D.chunk(6, -1)
        images = packing.image_T, packing.cu_seqlens_I1, packing.max_seqlen
        x_TD, m_TD = _Branch.apply(x_TD, shift, scale, *images)
        attn, mlp = cast(FusedAttention, self.attn), cast(FusedSwiGLU | FusedGeluMLP, self.mlp)
        y_TD, bias_D = attn.inner(m_TD, rope_TD, packing)
        x_TD, m_TD = _Join.apply(x_TD, y_TD, bias_D, gate, shift_of_mlp, scale_of_mlp, *images)
        y_TD, bias_D = mlp.inner(m_TD)
        return _AddGated.apply(x_TD, y_TD, bias_D, gate_of_mlp, *images)


class _Branch(torch.autograd.Function):
    """x, and norm(x) (1 + scale) + shift."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, shift_ID: Tensor, scale_ID: Tensor, image_T: Tensor, cu_seqlens_I1: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_TD, scale_ID, cu_seqlens_I1)
        ctx.longest = longest
        return x_TD.view_as(x_TD), _modulated(x_TD, shift_ID, scale_ID, image_T)

    @staticmethod
    def backward(ctx: Any, *grads_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, scale_ID, cu = ctx.saved_tensors
        grad_TD, sums = operators.norm_backward(*grads_TD, x_TD, scale_ID, cu, ctx.longest)
        return grad_TD, *_added(sums, scale_ID.dtype, 2), None, None, None


class _Join(torch.autograd.Function):
    """z = x + gate y, and norm(z) (1 + scale) + shift; y has a bias."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, y_TD: Tensor, bias_D: Tensor, gate_ID: Tensor, shift_ID: Tensor, scale_ID: Tensor,
        image_T: Tensor, cu_seqlens_I1: Tensor, longest: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(x_TD, y_TD, gate_ID, scale_ID, cu_seqlens_I1)
        ctx.longest = longest
        z_TD = x_TD + gate_ID.index_select(0, image_T) * y_TD
        return z_TD, _modulated(z_TD, shift_ID, scale_ID, image_T)

    @staticmethod
    def backward(ctx: Any, *grads_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, y_TD, gate_ID, scale_ID, cu = ctx.saved_tensors
        grads = operators.join_backward(*grads_TD, x_TD, y_TD, gate_ID, scale_ID, cu, ctx.longest)
        shift, scale, plain, gate = _added(grads[2], torch.float32, 4)
        bias = _of_bias(plain, gate_ID)
        of_values = (grad.to(scale_ID.dtype) for grad in (gate, shift, scale))
        return grads[0], grads[1], bias, *of_values, None, None, None


class _AddGated(torch.autograd.Function):
    """x + gate y; y has a bias."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, y_TD: Tensor, bias_D: Tensor, gate_ID: Tensor, image_T: Tensor, cu_seqlens_I1: Tensor,
        longest: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(y_TD, gate_ID, cu_seqlens_I1)
        ctx.longest = longest
        return x_TD + gate_ID.index_select(0, image_T) * y_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        y_TD, gate_ID, cu = ctx.saved_tensors
        grad_y_TD, sums = operators.gate_backward(grad_TD, y_TD, gate_ID, cu, ctx.longest)
        plain, gate = _added(sums, torch.float32, 2)
        return grad_TD, grad_y_TD, _of_bias(plain, gate_ID), gate.to(gate_ID.dtype), None, None, None


class _Heads(torch.autograd.Function):
    """q and k, normalised with ``norm`` and rotated, and v, of a product that has a bias."""

    @staticmethod
    def forward(
        ctx: Any, qkv_TK: Tensor, bias_K: Tensor, cos_TD: Tensor, sin_TD: Tensor, head_dim: int, norm: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(qkv_TK, cos_TD, sin_TD)
        ctx.norm = norm
        q_THD, k_THD, v_THD = qkv_TK.unflatten(-1, (3, -1, head_dim)).unbind(1)
        if norm:
            q_THD, k_THD = layer_norm(q_THD), layer_norm(k_THD)
        return rotate(q_THD, cos_TD, sin_TD), rotate(k_THD, cos_TD, sin_TD), v_THD

    @staticmethod
    def backward(ctx: Any, *grads_THD: Tensor) -> tuple[Tensor | None, ...]:
        grad_TK, sums = operators.heads_backward(*grads_THD, *ctx.saved_tensors, ctx.norm)
        return grad_TK, sums.sum(0).to(grad_TK.dtype), None, None, None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) value. ``parts`` are both, or one tensor with both side by side; ``bias_2H`` are those of both."""

    @staticmethod
    def forward(ctx: Any, bias_2H: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        gate_TH, value_TH = _gate_and_value(parts)
        return F.silu(gate_TH) * value_TH

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, ...]:  # pyrefly: ignore[bad-override]
        parts = ctx.saved_tensors
        grad_T2H, sums = operators.swiglu_backward(grad_TH, *_gate_and_value(parts))
        return sums.sum(0).to(grad_TH.dtype), *grad_T2H.chunk(len(parts), -1)


def _gate_and_value(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return parts if len(parts) == 2 else parts[0].chunk(2, -1)


def _modulated(x_TD: Tensor, shift_ID: Tensor, scale_ID: Tensor, image_T: Tensor) -> Tensor:
    return modulated(x_TD, shift_ID.index_select(0, image_T), scale_ID.index_select(0, image_T))


def _added(sums_ICK: Tensor, dtype: torch.dtype, parts: int) -> tuple[Tensor, ...]:
    """The sums of whole images, by what they are of."""
    return sums_ICK.sum(1).to(dtype).chunk(parts, -1)


def _of_bias(sums_ID: Tensor, gate_ID: Tensor) -> Tensor:
    """The gradient of y's bias in x + gate y, from the sums of the gradient of x over each image."""
    return (sums_ID * gate_ID).sum(0).to(gate_ID.dtype)
