"""The backward pass of what a block computes outside of products and attention: one operator for each stage.

An operator reads the gradient of its stage's result once, and writes those of its inputs and the sums that become the
gradients of AdaLN's values and of biases. Such sums are of a few tokens each, and whoever calls it adds them up: a row
for each ``CHUNK`` tokens, counted in each image (``*_ICK``) or over the pack (``*_CK``).

They are operators of torch, so that the compiler leaves them whole. On CUDA each is a kernel written in Triton
(``norm_and_gate_triton``, ``heads_and_swiglu_triton``), elsewhere the same in plain torch. Everything is computed in
float32. T tokens, I image slots, D channels, H of the MLP, K sums; ``longest`` is a bound of the images' tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, library

from fitv2_scale.model.modulation import NORM_EPS

CHUNK = 64  # tokens of one sum


def chunks(tokens: int) -> int:
    """Of so many tokens."""
    return -(-tokens // CHUNK)


@library.custom_op("fitv2_scale::gate_backward", mutates_args=())
def gate_backward(
    grad_TD: Tensor, y_TD: Tensor, gate_ID: Tensor, cu_seqlens_I1: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """Of x + gate y: the gradient of y, and the sums of ``grad_TD`` and of its product with y, K = 2 D."""
    image_T = _images(cu_seqlens_I1, grad_TD.shape[0])
    grad = grad_TD.float()
    sums = _sums(torch.cat((grad, grad * y_TD.float()), -1), cu_seqlens_I1, longest)
    return (grad * gate_ID.float()[image_T]).to(y_TD.dtype), sums


@library.custom_op("fitv2_scale::norm_backward", mutates_args=())
def norm_backward(
    grad_x_TD: Tensor, grad_m_TD: Tensor, x_TD: Tensor, scale_ID: Tensor, cu_seqlens_I1: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """Of x and m = norm(x) (1 + scale) + shift, whose gradients are ``grad_x_TD`` and ``grad_m_TD``: the gradient of x,
    and the sums of ``grad_m_TD`` and of its product with norm(x), K = 2 D."""
    grad, sums_T2D = _norm_backward(grad_x_TD, grad_m_TD, x_TD.float(), scale_ID, cu_seqlens_I1)
    return grad.to(x_TD.dtype), _sums(sums_T2D, cu_seqlens_I1, longest)


@library.custom_op("fitv2_scale::join_backward", mutates_args=())
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
    """Of z = x + gate y and m = norm(z) (1 + scale) + shift, whose gradients are ``grad_x_TD`` and ``grad_m_TD``: the
    gradients of x and of y, and four sums: those of ``norm_backward``, then of the gradient of x and of its product
    with y, K = 4 D."""
    gate, y = gate_ID.float()[_images(cu_seqlens_I1, x_TD.shape[0])], y_TD.float()
    grad, sums_T2D = _norm_backward(grad_x_TD, grad_m_TD, x_TD.float() + gate * y, scale_ID, cu_seqlens_I1)
    sums = _sums(torch.cat((sums_T2D, grad, grad * y), -1), cu_seqlens_I1, longest)
    return grad.to(x_TD.dtype), (grad * gate).to(y_TD.dtype), sums


@library.custom_op("fitv2_scale::swiglu_backward", mutates_args=())
def swiglu_backward(grad_TH: Tensor, gate_TH: Tensor, value_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Of silu(gate) value: the gradients of gate and value side by side (T, 2 H), and their sums, K = 2 H."""
    grad, gate = grad_TH.float(), gate_TH.float()
    sigmoid = gate.sigmoid()
    grad_gate = grad * value_TH.float() * sigmoid * (1 + gate * (1 - sigmoid))
    grads = torch.cat((grad_gate, grad * gate * sigmoid), -1)
    return grads.to(grad_TH.dtype), _sums_of_pack(grads)


@library.custom_op("fitv2_scale::heads_backward", mutates_args=())
def heads_backward(
    grad_q_THD: Tensor,
    grad_k_THD: Tensor,
    grad_v_THD: Tensor,
    qkv_TK: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    norm: bool,
) -> tuple[Tensor, Tensor]:
    """Of the three parts of ``qkv_TK``, q and k normalised, if there is a ``norm``, and rotated (``rope.rotate``): its
    gradient, and the sums of that, K = 3 H D with H heads of D channels."""
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    qk = qkv_TK.float().unflatten(-1, (3, *grad_q_THD.shape[1:])).unbind(1)[:2]
    parts = []
    for x, grad in zip(qk, (grad_q_THD, grad_k_THD), strict=True):
        along = grad.float() * sin
        grad = grad.float() * cos + along.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        parts.append(_layer_norm_backward(grad, *_normed(x)) if norm else grad)
    grads = torch.stack((*parts, grad_v_THD.float()), 1).flatten(1)
    return grads.to(qkv_TK.dtype), _sums_of_pack(grads)


def _normed(x: Tensor) -> tuple[Tensor, Tensor]:
    """x normalised over the last dimension, and 1 / its standard deviation."""
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    rstd = (variance + NORM_EPS).rsqrt()
    return (x - mean) * rstd, rstd


def _layer_norm_backward(grad: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    along = (grad * normed).mean(-1, keepdim=True)
    return rstd * (grad - grad.mean(-1, keepdim=True) - normed * along)


def _norm_backward(
    grad_x_TD: Tensor, grad_m_TD: Tensor, x: Tensor, scale_ID: Tensor, cu_seqlens_I1: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of x in float32, and what is to be summed for shift and scale."""
    grad_m, (normed, rstd) = grad_m_TD.float(), _normed(x)
    factor = 1 + scale_ID.float()[_images(cu_seqlens_I1, x.shape[0])]
    grad = grad_x_TD.float() + _layer_norm_backward(grad_m * factor, normed, rstd)
    return grad, torch.cat((grad_m, grad_m * normed), -1)


def _images(cu_seqlens_I1: Tensor, tokens: int) -> Tensor:
    """The slot of each token."""
    token_T = torch.arange(tokens, device=cu_seqlens_I1.device)
    return torch.searchsorted(cu_seqlens_I1[1:].contiguous(), token_T, right=True)


def _sums(x_TK: Tensor, cu_seqlens_I1: Tensor, longest: int) -> Tensor:
    """Over each ``CHUNK`` tokens of each image: (I, chunks of the longest, K)."""
    images, each = cu_seqlens_I1.shape[0] - 1, chunks(longest)
    image_T = _images(cu_seqlens_I1, x_TK.shape[0])
    place_T = torch.arange(x_TK.shape[0], device=x_TK.device) - cu_seqlens_I1[image_T]
    out = x_TK.new_zeros(images * each, x_TK.shape[1])
    return out.index_add_(0, image_T * each + place_T // CHUNK, x_TK).unflatten(0, (images, each))


def _sums_of_pack(x_TK: Tensor) -> Tensor:
    """Over each ``CHUNK`` tokens: (chunks, K)."""
    return F.pad(x_TK, (0, 0, 0, -x_TK.shape[0] % CHUNK)).unflatten(0, (-1, CHUNK)).sum(1)


def _float32(like: Tensor, *size: int) -> Tensor:
    return like.new_empty(size, dtype=torch.float32)


@gate_backward.register_fake
def _(grad_TD: Tensor, y_TD: Tensor, gate_ID: Tensor, cu_seqlens_I1: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    (tokens, channels), images = y_TD.shape, gate_ID.shape[0]
    return y_TD.new_empty(tokens, channels), _float32(y_TD, images, chunks(longest), 2 * channels)


@norm_backward.register_fake
def _(
    grad_x_TD: Tensor, grad_m_TD: Tensor, x_TD: Tensor, scale_ID: Tensor, cu_seqlens_I1: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    (tokens, channels), images = x_TD.shape, scale_ID.shape[0]
    return x_TD.new_empty(tokens, channels), _float32(x_TD, images, chunks(longest), 2 * channels)


@join_backward.register_fake
def _(
    grad_x_TD: Tensor,
    grad_m_TD: Tensor,
    x_TD: Tensor,
    y_TD: Tensor,
    gate_ID: Tensor,
    scale_ID: Tensor,
    cu_seqlens_I1: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, channels), images = x_TD.shape, scale_ID.shape[0]
    grads = x_TD.new_empty(tokens, channels), y_TD.new_empty(tokens, channels)
    return *grads, _float32(x_TD, images, chunks(longest), 4 * channels)


@swiglu_backward.register_fake
def _(grad_TH: Tensor, gate_TH: Tensor, value_TH: Tensor) -> tuple[Tensor, Tensor]:
    tokens, width = grad_TH.shape
    return grad_TH.new_empty(tokens, 2 * width), _float32(grad_TH, chunks(tokens), 2 * width)


@heads_backward.register_fake
def _(
    grad_q_THD: Tensor,
    grad_k_THD: Tensor,
    grad_v_THD: Tensor,
    qkv_TK: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    norm: bool,
) -> tuple[Tensor, Tensor]:
    tokens, width = qkv_TK.shape
    return qkv_TK.new_empty(tokens, width), _float32(qkv_TK, chunks(tokens), width)
