"""Each operator, in torch and in Triton: against autograd in float64 of the plain formulas, on the CPU by Triton's
interpreter."""

import importlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import library

from fitv2_scale.model.kernels import on_cuda, operators
from tests.support.triton_interpreter import interpreter

LENGTHS = [[5, 1, 70, 0, 33, 0], [64, 65], [0, 130, 0], [3]]  # of one sum and of several; slots without tokens
SIZES = [(0, 64), (0, 72), (0, 96), (1, 130), (2, 6), (3, 2304)]  # which lengths, channels
HEAD_DIMS = [64, 72, 96]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # of a gradient's norm: that of bf16 is what rounding takes
SUMS = 2e-6  # of the norm of all sums


@dataclass(frozen=True)
class Case:
    """What an operator is given, and in float64 what it has to give: gradients, and what its sums add up to."""

    operator: str
    given: tuple
    gradients: list[torch.Tensor]
    sums: torch.Tensor  # of the images (I, K), or of the pack (K,)
    lengths: list[int] = field(default_factory=list)


@pytest.fixture
def interpreted():
    with interpreter() as call:
        yield call


def leaves(*values: torch.Tensor) -> list[torch.Tensor]:
    return [value.double().requires_grad_() for value in values]


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def by_image(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return torch.stack([part.sum(0) for part in x.split(lengths)])


def of_images(lengths: list[int], channels: int, dtype: torch.dtype) -> list[Case]:
    """The three operators of norms and gates."""
    image_T, cu = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)), cumulative(lengths)
    grad, grad_m, x, y = torch.randn(4, sum(lengths), channels).to(dtype)
    gate_ID, scale_ID = torch.randn(2, len(lengths), 3, channels).to(dtype)[:, :, 1]  # columns of a wider tensor
    longest = max(lengths) + 30

    def gradients(formula):
        into = leaves(x, y, gate_ID, scale_ID, torch.zeros(gate_ID.shape))
        outs = formula(*into)
        return torch.autograd.grad(outs, into, [grad.double(), grad_m.double()][: len(outs)], allow_unused=True)

    def joined(x, y, gate, scale, shift):
        z = x + gate[image_T] * y
        return z, norm(z) * (1 + scale[image_T]) + shift[image_T]

    of_x, of_y, gate, scale, shift = gradients(joined)
    sums = torch.cat((shift, scale, by_image(of_x, lengths), gate), -1)
    join = Case("join_backward", (grad, grad_m, x, y, gate_ID, scale_ID, cu, longest), [of_x, of_y], sums, lengths)

    def normed(x, _y, _gate, scale, shift):
        return x * 1, norm(x) * (1 + scale[image_T]) + shift[image_T]

    of_x, _, _, scale, shift = gradients(normed)
    sums = torch.cat((shift, scale), -1)
    alone = Case("norm_backward", (grad, grad_m, x, scale_ID, cu, longest), [of_x], sums, lengths)
    of_x, of_y, gate, *_ = gradients(lambda x, y, gate, *_: (x + gate[image_T] * y,))
    sums = torch.cat((by_image(of_x, lengths), gate), -1)
    return [join, alone, Case("gate_backward", (grad, y, gate_ID, cu, longest), [of_y], sums, lengths)]


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def of_swiglu(tokens: int, width: int, dtype: torch.dtype) -> list[Case]:
    """Gate and value as two tensors, and as halves of one."""
    grad, both = torch.randn(tokens, width).to(dtype), torch.randn(tokens, 2 * width).to(dtype)
    (leaf,) = leaves(both)
    gate, value = leaf.chunk(2, -1)
    (expected,) = torch.autograd.grad(F.silu(gate) * value, leaf, grad.double())
    halves = both.chunk(2, -1)
    apart = tuple(half.contiguous() for half in halves)
    return [Case("swiglu_backward", (grad, *parts), [expected], expected.sum(0)) for parts in (halves, apart)]


def of_heads(tokens: int, heads: int, dim: int, with_norm: bool, dtype: torch.dtype) -> Case:
    """Pairs of channels are turned by angles, as complex numbers are."""
    angle = torch.rand(tokens, dim // 2, dtype=torch.float64) * 7
    cos, sin = angle.cos().float(), angle.sin().float()
    by_channel = cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)
    turn = torch.complex(cos.double(), sin.double())[:, None]
    grads, qkv = torch.randn(3, tokens, heads, dim).to(dtype), torch.randn(tokens, 3 * heads * dim).to(dtype)
    (leaf,) = leaves(qkv)
    q, k, v = leaf.unflatten(-1, (3, heads, dim)).unbind(1)
    qk = [torch.view_as_complex((norm(x) if with_norm else x).unflatten(-1, (-1, 2))) * turn for x in (q, k)]
    outs = [*(torch.view_as_real(x).flatten(-2) for x in qk), v]
    (expected,) = torch.autograd.grad(outs, leaf, [grad.double() for grad in grads])
    return Case("heads_backward", (*grads, qkv, *by_channel, with_norm), [expected], expected.sum(0))


def all_cases(dtype: torch.dtype) -> list[Case]:
    torch.manual_seed(0)
    found = [case for i, channels in SIZES for case in of_images(LENGTHS[i], channels, dtype)]
    found += [case for size in ((130, 40), (64, 128), (5, 300)) for case in of_swiglu(*size, dtype)]
    return found + [of_heads(70, 2, dim, with_norm, dtype) for dim in HEAD_DIMS for with_norm in (True, False)]


def run_each(cases: list[Case]) -> list:
    """In Triton. Views are made again: strides do not survive the way to another process."""
    found = []
    for case in cases:
        given = list(case.given)
        if case.operator == "swiglu_backward":
            given[1:] = torch.cat(given[1:], -1).chunk(2, -1)
        found.append(on_cuda.kernel(case.operator)(*given))
    return found


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_gradients_and_sums(interpreted, kernels, dtype):
    cases = all_cases(dtype)
    ways = {"torch": lambda: [getattr(operators, case.operator)(*case.given) for case in cases]}
    ways["triton"] = lambda: interpreted(run_each, cases)
    for case, (*gradients, sums) in zip(cases, ways[kernels](), strict=True):
        for found, wanted in zip(gradients, case.gradients, strict=True):
            assert found.dtype == dtype and off(found, wanted) <= BOUNDS[dtype], case.operator
        assert sums.dtype == torch.float32
        assert off(sums.double().sum(1 if case.lengths else 0), case.sums) <= SUMS, case.operator
        assert [sums[i, (n + 63) // 64 :].any() for i, n in enumerate(case.lengths)].count(True) == 0


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.norm())


def test_what_is_not_contiguous(interpreted):
    """Tokens in columns, and every other channel."""
    torch.manual_seed(0)
    for case in (*of_images([5, 9], 24, torch.float32), *of_swiglu(14, 24, torch.float32)):
        plain = [t.contiguous() if isinstance(t, torch.Tensor) else t for t in case.given]
        for found, wanted in zip(interpreted(run_apart, case.operator, plain), case.gradients, strict=False):
            assert off(found, wanted) <= BOUNDS[torch.float32]
    heads = of_heads(70, 2, 64, True, torch.float32)
    assert off(interpreted(run_apart, heads.operator, list(heads.given))[0], heads.gradients[0]) < 2e-6


def run_apart(operator: str, given: list):
    return on_cuda.kernel(operator)(*map(apart, given))


def apart(value):
    """The same numbers with other strides."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.repeat_interleave(2, -1).transpose(0, 1).contiguous().transpose(0, 1)[..., ::2]


def test_every_operator_is_a_kernel_on_cuda():
    importlib.import_module("fitv2_scale.model.kernels.block")  # which registers them
    names = {name for name, value in vars(operators).items() if isinstance(value, library.CustomOpDef)}
    assert names == on_cuda.MODULES.keys()
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fitv2_scale::{name}", "CUDA")


def test_the_compiler_is_told_the_truth():
    """Shapes, dtypes and devices of results that it knows before they are there."""
    for case in (*of_images([5, 9], 24, torch.bfloat16), *of_swiglu(70, 24, torch.bfloat16)):
        library.opcheck(getattr(operators, case.operator), case.given, test_utils=("test_schema", "test_faketensor"))
    heads = of_heads(70, 2, 64, True, torch.bfloat16)
    library.opcheck(operators.heads_backward, heads.given, test_utils=("test_schema", "test_faketensor"))
