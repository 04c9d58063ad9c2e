"""Linears whose products are computed in 8-bit floating point (fp8), scaled by row.

Each row of a factor, along the dim that is summed, is divided by a scale that makes its largest absolute value the
largest number of e4m3; the scales, made in each product, multiply the result. So are the result of a linear and the
gradient of its input computed. The gradient of the weight is a product in the inputs' own precision: it sums over
tokens, so both factors would have to be scaled and stored once more, by channel, and one token that is far larger than
the others would cost a whole channel its precision.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitv2_scale.config.layout import Precision
from fitv2_scale.model.linear import Linear, LinearFactory, Role, plain_linear

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
_SMALLEST = 2.0**-100  # a row's absolute maximum counts as no less: no scale is zero, or too small for its reciprocal


class Scaled(NamedTuple):
    """A matrix as ``values`` times the scale of each row."""

    values_RK: Tensor  # e4m3
    scale_R1: Tensor  # float32


class Float8Linear(Linear):
    """An nn.Linear of the same parameters. Both of its sizes must be multiples of 16 on a GPU."""

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.weight, self.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _Product.apply(x, weight, bias)


def float8_linear(in_features: int, out_features: int, role: Role) -> nn.Module:
    """The factory of networks in fp8. Linears of the role ``replicated`` stay in bf16: they are too small to gain."""
    return (Linear if role == "replicated" else Float8Linear)(in_features, out_features)


def scaled_rows(x_RK: Tensor) -> Scaled:
    """``x_RK`` in e4m3. A row that holds a number that is not finite becomes NaN as a whole; one of zeros stays so."""
    scale_R1 = x_RK.abs().amax(-1, keepdim=True).float().clamp_min(_SMALLEST) / _LARGEST
    return Scaled((x_RK.float() / scale_R1).to(_E4M3).contiguous(), scale_R1)


def scaled_product(a: Scaled, b: Scaled, dtype: torch.dtype, bias_N: Tensor | None = None) -> Tensor:
    """The product of ``a`` with the transposed ``b``, and ``bias_N``, summed in float32: (rows of a, rows of b)."""
    if not a.values_RK.is_cuda:
        return reference_product(a, b, dtype, bias_N)
    # Without use_fast_accum, which sums in less than float32.
    return F.scaled_mm(
        a.values_RK,
        b.values_RK.t(),
        a.scale_R1,
        F.ScalingType.RowWise,
        b.scale_R1.t(),
        F.ScalingType.RowWise,
        bias=bias_N,
        output_dtype=dtype,
    )


def reference_product(a: Scaled, b: Scaled, dtype: torch.dtype, bias_N: Tensor | None = None) -> Tensor:
    """``scaled_product`` in plain operators."""
    out_RN = (a.values_RK.float() @ b.values_RK.float().t()) * a.scale_R1 * b.scale_R1.t()
    return (out_RN if bias_N is None else out_RN + bias_N).to(dtype)


class _Product(torch.autograd.Function):
    """x weight^T + bias."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        return scaled_product(scaled_rows(x_TK), scaled_rows(weight_NK), x_TK.dtype, bias_N)

    @staticmethod
    # Autograd calls it with one gradient for each output; torch's annotation leaves their number open.
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (x_TK, weight_NK), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        grad_bias_N = grad_TN.sum(0) if of_bias else None
        grad_x_TK = scaled_product(scaled_rows(grad_TN), scaled_rows(weight_NK.t()), grad_TN.dtype) if of_x else None
        return grad_x_TK, grad_TN.t() @ x_TK if of_weight else None, grad_bias_N


LINEARS: dict[Precision, LinearFactory] = {"fp32": plain_linear, "bf16": plain_linear, "fp8": float8_linear}
