"""A CPU kernel for torch's varlen operator: what CUDA runs is run, with its gradients, on a machine without a GPU.

It goes from image to image and asserts what FlashAttention demands. It rounds where FlashAttention does: products and
softmax are float32, their factors bf16, so probabilities and the gradients of scores are rounded before a product.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen  # which defines the operator
from torch import Tensor, library

from fitv2_scale.model import attention
from fitv2_scale.parallel import blocks

HALF = (torch.bfloat16, torch.float16)
ONE_WINDOW = [-1, -1]  # every token sees all of its image


@dataclass
class Calls:
    """How often the operator, and its gradient, were computed."""

    forward: int = 0
    backward: int = 0


@contextmanager
def varlen_on_cpu() -> Iterator[Calls]:
    """Until it ends, attention of half precision goes through the varlen operator on a CPU too.

    The kernels are taken back with their library; torch then refuses the operator on a CPU again.
    """
    calls = Calls()

    def forward(q, k, v, cu, cu_k, longest, longest_k, causal=False, scale=None, *others):
        calls.forward += 1
        _assert_as_flash_wants((q, k, v), (cu, cu_k), (longest, longest_k))
        _assert_unused(causal, *others)
        out, lse = _forward(q, k, v, cu, scale)
        return out, lse, torch.zeros(2, dtype=torch.uint64)

    def backward(grad, q, k, v, out, lse, cu, cu_k, longest, longest_k, causal, rng, scale=None, *others):
        calls.backward += 1
        _assert_as_flash_wants((q, k, v, grad, out), (cu, cu_k), (longest, longest_k))
        _assert_unused(causal, *others)
        return _backward(grad, q, k, v, out, lse, cu, scale)

    with library._scoped_library("torch_attn", "IMPL") as kernels, pytest.MonkeyPatch.context() as patch:
        kernels.impl("_varlen_attn", forward, "CPU")
        kernels.impl("_varlen_attn_backward", backward, "CPU")
        for module in (attention, blocks):
            patch.setattr(module, "has_varlen", lambda x: x.dtype in HALF)
        yield calls


def _assert_as_flash_wants(tensors: tuple[Tensor, ...], both_cu: tuple[Tensor, Tensor], longest: tuple) -> None:
    """What the kernel refuses on a GPU, and what it does not refuse but computes wrongly: an image that is longer than
    it was told keeps what lay in the memory of its last tokens."""
    tokens, heads, dim = tensors[0].shape
    assert dim % 8 == 0 and dim <= 256
    for x_THD in tensors:
        assert x_THD.shape == (tokens, heads, dim) and x_THD.stride(-1) == 1
        assert x_THD.dtype in HALF and x_THD.dtype == tensors[0].dtype
    for cu, most in zip(both_cu, longest, strict=True):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu.dim() == 1
        assert cu[0] == 0 and cu[-1] == tokens and cu.diff().min() >= 0 and cu.diff().max() <= most


def _assert_unused(causal: bool, *others: Any) -> None:
    assert not causal and all(other in (None, False, ONE_WINDOW) for other in others)


def _images(cu: Tensor) -> Iterator[slice]:
    return (slice(begin, end) for begin, end in pairwise(cu.tolist()) if begin < end)


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    return torch.einsum("qhd,khd->hqk", q.float(), k.float()) * (scale or q.shape[-1] ** -0.5)


def _forward(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    out, lse = torch.full_like(q, torch.nan), torch.zeros(q.shape[1], q.shape[0])
    for image in _images(cu):
        scores = _scores(q[image], k[image], scale)
        top = scores.amax(-1, keepdim=True)
        weight = (scores - top).exp()
        total = weight.sum(-1, keepdim=True)
        sums = torch.einsum("hqk,khd->hqd", weight.to(v.dtype).float(), v[image].float())
        out[image] = (sums / total).transpose(0, 1).to(out.dtype)
        lse[:, image] = (top + total.log())[..., 0]
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """From the result and the log-sum-exp that were kept, as FlashAttention."""
    of_q, of_k, of_v = (torch.full_like(x, torch.nan) for x in (q, k, v))
    factor = scale or q.shape[-1] ** -0.5
    for image in _images(cu):
        weight = (_scores(q[image], k[image], scale) - lse[:, image, None]).exp()
        of_weight = torch.einsum("qhd,khd->hqk", grad[image].float(), v[image].float())
        inner = (grad[image].float() * out[image].float()).sum(-1).T[..., None]
        of_scores = (weight * (of_weight - inner)).to(q.dtype).float()
        of_q[image] = (torch.einsum("hqk,khd->qhd", of_scores, k[image].float()) * factor).to(q.dtype)
        of_k[image] = (torch.einsum("hqk,qhd->khd", of_scores, q[image].float()) * factor).to(q.dtype)
        of_v[image] = torch.einsum("hqk,qhd->khd", weight.to(q.dtype).float(), grad[image].float()).to(q.dtype)
    return of_q, of_k, of_v
