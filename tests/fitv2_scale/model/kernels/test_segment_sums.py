"""Sums over the tokens of each image, in torch and in Triton: against float64, on the CPU by Triton's interpreter."""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
from torch import library
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fitv2_scale.model.kernels import modulation, segment_sums, segment_sums_triton
from fitv2_scale.model.kernels.modulation import Summed
from fitv2_scale.model.packed_batch import Packing
from tests.support.triton_interpreter import interpreter

LENGTHS = [[5, 1, 70, 0, 33, 0], [256, 256], [0, 40], [3]]  # one block of tokens and several, empty slots
CHANNELS = [64, 72, 96, 130, 7]
BOUND = 1e-6  # of the largest sum, or of 1
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def interpreted():
    with interpreter() as call:
        yield call


def inputs(lengths: list[int], channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    tokens = sum(lengths)
    a, b = torch.randn(2, tokens, channels).to(dtype)
    mean, rstd = torch.randn(tokens), torch.rand(tokens) + 0.5
    return a, b, mean, rstd, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def by_slices(x_TD: np.ndarray, lengths: list[int]) -> np.ndarray:
    ends = np.cumsum(lengths)
    return np.stack([x_TD[end - n : end].sum(0) for n, end in zip(lengths, ends, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sums(interpreted, dtype):
    torch.manual_seed(0)
    cases = {(i, channels): inputs(LENGTHS[i], channels, dtype) for i in range(len(LENGTHS)) for channels in CHANNELS}
    found = interpreted(in_triton_each, list(cases.values()))
    for (i, _), tensors, sums in zip(cases, cases.values(), found, strict=True):
        left, right, middle, factor = (x.double().numpy() for x in tensors[:4])
        normed = left * (right - middle[:, None]) * factor[:, None]
        expected = np.concatenate((by_slices(left, LENGTHS[i]), by_slices(normed, LENGTHS[i])), 1)
        for of_norm, of_product in (sums, both_sums(segment_sums, *tensors)):
            assert_near(of_norm, expected)
            assert_near(of_product, by_slices(left * right, LENGTHS[i]))


def both_sums(kernels, a, b, mean, rstd, cu):
    return kernels.norm_sums(a, b, mean, rstd, cu), kernels.product_sums(a, b, cu)


def in_triton(*tensors):
    return both_sums(segment_sums_triton, *tensors)


def in_triton_each(cases):
    return [in_triton(*tensors) for tensors in cases]


def test_what_is_not_contiguous(interpreted):
    a, b, mean, rstd, cu = inputs([5, 9], 24, torch.float32)
    apart = a.T.contiguous().T, b.repeat_interleave(2, 1)[:, ::2], mean.repeat_interleave(2)[::2], rstd
    whole = both_sums(segment_sums, a, b, mean, rstd, cu)
    torch.testing.assert_close(both_sums(segment_sums, *apart, cu), whole)
    torch.testing.assert_close(interpreted(in_triton_of_columns, a, b, mean, rstd, cu), whole)


def in_triton_of_columns(a, b, mean, rstd, cu):
    """Of tensors with other strides, which do not survive the way to another process."""
    return in_triton(a.T.contiguous().T, b.repeat_interleave(2, 1)[:, ::2], mean, rstd.repeat_interleave(2)[::2], cu)


def assert_near(found: torch.Tensor, expected: np.ndarray) -> None:
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert np.abs(found.double().numpy() - expected).max() <= BOUND * max(1, np.abs(expected).max())


def test_the_compiler_is_told_the_truth():
    """Shapes, dtypes and devices of results that it knows before they are there."""
    a, b, mean, rstd, cu = inputs([5, 9], 24, torch.bfloat16)
    for operator, given in ((segment_sums.norm_sums, (a, b, mean, rstd, cu)), (segment_sums.product_sums, (a, b, cu))):
        library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_gradients_of_modulation(interpreted, kernels, dtype, bound):
    """Of x, y and the six vectors, relative to their norm: against plain formulas in float64."""
    torch.manual_seed(0)
    values = *torch.randn(3, sum(LENGTHS[0]), 96).to(dtype), torch.randn(len(LENGTHS[0]), 6 * 96).to(dtype)
    expected = results_and_gradients(by_formulas, *(value.double() for value in values))
    ways = {"torch": lambda: results_and_gradients(by_parts, *values)}
    ways["triton"] = lambda: interpreted(gradients_in_triton, *values)
    for found, wanted in zip(ways[kernels](), expected, strict=True):
        assert found.dtype == dtype
        assert (found.double() - wanted).norm() <= bound * wanted.norm()


def results_and_gradients(function, gradient, x, y, vectors):
    leaves = [t.requires_grad_() for t in (x, y, vectors)]
    out = function(*leaves)
    return [t.detach() for t in (out, *torch.autograd.grad(out, leaves, gradient))]


def gradients_in_triton(*values):
    modulation.norm_sums, modulation.product_sums = segment_sums_triton.norm_sums, segment_sums_triton.product_sums
    return results_and_gradients(by_parts, *values)


def image_of_tokens() -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(LENGTHS[0])), torch.tensor(LENGTHS[0]))


def by_formulas(x, y, vectors):
    for half in vectors[image_of_tokens()].chunk(2, -1):
        shift, scale, gate = half.chunk(3, -1)
        x = x + gate * (y * (F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift))
    return x


def by_parts(x, y, vectors):
    image_T, cu = image_of_tokens(), torch.tensor([0, *np.cumsum(LENGTHS[0])], dtype=torch.int32)
    parts = Summed(vectors, 6, Packing(cu, image_T, image_T, image_T[:, None].expand(-1, 2), 70))
    for half in (0, 1):
        x = parts.add_gated(x, y * parts.modulate(x, 3 * half, 3 * half + 1), 3 * half + 2)
    return x


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_on_hopper_no_register_is_spilled(dtype, norm, tmp_path):
    types = {"a": f"*{dtype}", "b": f"*{dtype}", "mean": "*fp32", "rstd": "*fp32", "cu_seqlens": "*i32"}
    types |= {"out": "*fp32", "channels": "i32"}
    constants = {"NORM": norm, **segment_sums_triton.BLOCKS}
    source = ASTSource(segment_sums_triton.sums, types | dict.fromkeys(constants, "constexpr"), constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    told = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", told)[1]) for word in ("REG", "STACK", "LOCAL"))
    assert (stack, local) == (0, 0) and registers <= 128
