"""Products in fp8: their error against float64, numbers that e4m3 holds, non-finite numbers, and which linears."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.torch_version import TorchVersion

from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.float8 import (
    LINEARS,
    Float8Linear,
    float8_linear,
    reference_product,
    scaled_product,
    scaled_rows,
)
from fitv2_scale.model.linear import merged
from fitv2_scale.model.network import DiffusionTransformer

MODEL = ModelConfig(depth=2, hidden=48, heads=2, classes=5)
T, K, N = 64, 96, 48
TO_E4M3, SMALLEST, LARGEST = 2.0**-4, 2.0**-10, 448.0  # largest rounding errors: relative, of subnormals; and number
TO_BF16, IN_FLOAT32 = 2.0**-8, 1e-5  # generous for sums of 96 terms


def drawn(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Rows whose sizes lie 16 orders of magnitude apart: with one scale for all, most would be zero."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.linspace(-8, 8, rows)[:, None]
    return (torch.randn(rows, columns, generator=generator) * sizes).bfloat16()


def within(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far a product of fp8 factors may be from ``a`` times the transposed ``b``: for each number half a step of
    e4m3, whose steps are 2**-3 of the binade, or of its subnormals, 2**-9 of a scale."""

    def off(x: np.ndarray) -> np.ndarray:
        scale = np.abs(x).max(1, keepdims=True) / LARGEST
        return np.maximum(TO_E4M3 * np.abs(x), SMALLEST * scale) * (1 + IN_FLOAT32)

    return (np.abs(a) + off(a)) @ (np.abs(b) + off(b)).T - np.abs(a) @ np.abs(b).T


def numbers(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def test_result_and_gradients_are_as_near_to_float64_as_e4m3_allows():
    """The gradient of the weight is nearer: of the bf16 factors, in bf16."""
    linear = Float8Linear(K, N).bfloat16()
    with torch.no_grad():
        linear.weight.copy_(drawn(N, K, 1))
        linear.bias.copy_(drawn(1, N, 2)[0])
    x, grad = drawn(T, K, 3).requires_grad_(), drawn(T, N, 4)
    out = linear(x)
    out.backward(grad)
    assert x.grad is not None and linear.weight.grad is not None and linear.bias.grad is not None
    a, w, g, b = numbers(x), numbers(linear.weight), numbers(grad), numbers(linear.bias)
    exact = a @ w.T + b
    for found, exact, bound in (
        (out, a @ w.T + b, within(a, w)),
        (x.grad, g @ w, within(g, w.T)),
        (linear.weight.grad, g.T @ a, IN_FLOAT32 * np.abs(g).T @ np.abs(a)),
        (linear.bias.grad, g.sum(0), IN_FLOAT32 * np.abs(g).sum(0)),
    ):
        assert (np.abs(numbers(found) - exact) <= bound * (1 + TO_BF16) + TO_BF16 * np.abs(exact)).all()
    assert (np.abs(numbers(out) - exact) > TO_BF16 * np.abs(exact)).mean() > 0.5  # and it is no product in bf16


def test_what_e4m3_holds_is_exact():
    """0 to 15 times a power of two, beside the largest number of the row: 448 times it."""
    values = torch.cat([torch.arange(16.0), torch.tensor([448.0])])
    rows = torch.stack([values, -values, values * 2.0**-60, values * 2.0**40])
    scaled = scaled_rows(rows)
    assert scaled.values_RK.dtype == torch.float8_e4m3fn and scaled.scale_R1.shape == (4, 1)
    assert torch.equal(scaled.values_RK.float() * scaled.scale_R1, rows)
    assert torch.equal(scaled.scale_R1[:, 0], torch.tensor([1.0, 1.0, 2.0**-60, 2.0**40]))


def test_the_weight_of_a_transposed_view_is_laid_out_by_its_rows():
    assert scaled_rows(torch.randn(16, 32).t()).values_RK.stride() == (16, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_of_zeros_stay_zero_and_what_is_not_finite_stays_visible(bad):
    linear = Float8Linear(16, 16).bfloat16()
    x = torch.randn(4, 16).bfloat16()
    x[0], x[1, 3] = 0, bad
    out = linear(x.requires_grad_())
    assert torch.equal(out[0], linear.bias) and out[1].isnan().all() and out[2:].isfinite().all()
    grad = torch.randn(4, 16).bfloat16()
    grad[0], grad[2, 5] = 0, bad
    out.backward(grad)
    assert x.grad is not None and linear.weight.grad is not None and linear.bias.grad is not None
    assert not x.grad[0].any() and x.grad[2].isnan().all() and x.grad[3].isfinite().all()
    assert not linear.weight.grad[5].isfinite().any() and not linear.bias.grad[5].isfinite()


def test_numbers_too_small_for_a_scale_become_zero():
    x = torch.full((1, 16), 2.0**-126)
    assert not scaled_rows(x).values_RK.float().any()


def test_the_large_linears_of_blocks_alone():
    """And names and shapes of the weights are the same."""
    names = {
        name
        for name, module in DiffusionTransformer(MODEL, LINEARS["fp8"]).named_modules()
        if isinstance(module, Float8Linear)
    }
    large = ("attn.qkv", "attn.proj", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2")
    assert names == {f"blocks.{i}.{name}" for i in range(2) for name in large}
    assert not [
        m
        for p in ("bf16", "fp32")
        for m in DiffusionTransformer(MODEL, LINEARS[p]).modules()
        if isinstance(m, Float8Linear)
    ]
    fp8, bf16 = (
        {n: p.shape for n, p in DiffusionTransformer(MODEL, LINEARS[p]).named_parameters()} for p in ("fp8", "bf16")
    )
    assert list(fp8.items()) == list(bf16.items())


def test_two_linears_as_one_product_give_the_same():
    """Rows have scales of their own, so the same bits."""
    gate, value = float8_linear(K, N, "column").bfloat16(), float8_linear(K, N, "column").bfloat16()
    x = drawn(T, K, 5)
    for one, linear in zip(merged(x, gate, value), (gate, value), strict=True):
        assert torch.equal(one, linear(x))


def test_frozen_weights_have_no_gradient():
    linear = Float8Linear(K, N).bfloat16().requires_grad_(False)
    x = drawn(T, K, 6).requires_grad_()
    linear(x).float().sum().backward()
    assert x.grad is not None and x.grad.any() and linear.weight.grad is None


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("rows", [64, 37])
def test_torch_has_the_same_product(device, rows):
    """On a GPU it is what trains; on a CPU, torch's own form for it, which releases before 2.13 lack."""
    if device == "cpu" and TorchVersion(torch.__version__) < "2.13":
        pytest.skip("torch 2.13 is the first whose CPU scales rows")
    a, b = scaled_rows(drawn(rows, K, 7).to(device)), scaled_rows(drawn(N, K, 8).to(device))
    bias, by_row = drawn(1, N, 9)[0].to(device), F.ScalingType.RowWise
    found = F.scaled_mm(
        a.values_RK, b.values_RK.t(), a.scale_R1, by_row, b.scale_R1.t(), by_row, bias=bias, output_dtype=torch.bfloat16
    )
    expected = reference_product(a, b, torch.bfloat16, bias)
    terms = [(one.values_RK.float() * one.scale_R1).abs() for one in (a, b)]
    size = terms[0] @ terms[1].t() + bias.float().abs()
    assert ((found.float() - expected.float()).abs() <= TO_BF16 * expected.float().abs() + IN_FLOAT32 * size).all()
    assert torch.equal(scaled_product(a, b, torch.bfloat16, bias), expected if device == "cpu" else found)
