"""Shifts, scales and gates of images, applied to their tokens: both ways against the formula."""

import pytest
import torch
from torch import Tensor

from data_sharding.plan.pack_layout import PackShape, lay_out
from fitv2_scale.model.modulation import ByImage, Gathered, modulation
from fitv2_scale.model.to_torch import packing_to_torch

HIDDEN, SLOTS, TOKENS = 12, 7, 50


@pytest.fixture
def packing():
    """Images of 20, 1 and 12 tokens, padding images of 16 and 1, and two slots without tokens."""
    packing = packing_to_torch(lay_out([(4, 5), (1, 1), (3, 4)], PackShape(TOKENS, SLOTS, 16 + 4)))
    assert sum(packing.lengths) == TOKENS and packing.lengths[:3] == [20, 1, 12] and packing.lengths[-1] == 0
    return packing


def by_formula(x_TD: Tensor, y_TD: Tensor, values_IK: Tensor, image_T: Tensor) -> Tensor:
    """x + gate f(layer_norm(x) (1 + scale) + shift) with f(z) = z y, from means and variances written out."""
    shift, scale, gate = values_IK[image_T].split(HIDDEN, -1)
    mean = x_TD.mean(-1, keepdim=True)
    normed = (x_TD - mean) / ((x_TD - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x_TD + gate * ((normed * (1 + scale) + shift) * y_TD)


def inputs(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(5)
    shapes = (TOKENS, HIDDEN), (TOKENS, HIDDEN), (SLOTS, 3 * HIDDEN)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("way", [ByImage, Gathered])
@pytest.mark.parametrize("dtype,rtol", [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 0.05)])
def test_values_and_gradients(packing, way, dtype, rtol):
    x, y, values = inputs(dtype)
    m = way(values, 3, packing)
    out = m.add_gated(x, m.modulate(x, 0, 1) * y, 2)
    assert out.dtype == dtype
    out.sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (x, y, values)]
    expected = by_formula(*exact, packing.image_T)
    expected.sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=rtol)
    for found, one in zip((x, y, values), exact, strict=True):
        torch.testing.assert_close(found.grad.double(), one.grad, rtol=rtol, atol=10 * rtol)
    assert not values.grad[-1].any()  # of a slot without tokens


def test_both_ways_give_the_same_bits(packing):
    """In the forward pass."""
    x, y, values = inputs(torch.float32)
    found = [m.add_gated(x, m.modulate(x, 0, 1) * y, 2) for m in (w(values, 3, packing) for w in (ByImage, Gathered))]
    assert torch.equal(*found)


def test_a_compiler_sees_no_lengths(packing):
    """Else it would compile again for each pack; what runs as it is goes from image to image."""
    seen = []

    def ask(values: Tensor) -> Tensor:
        seen.append(type(modulation(values, 3, packing)))
        return values + 1

    values = torch.zeros(SLOTS, 3 * HIDDEN)
    ask(values)
    torch.compile(ask, backend="eager")(values)
    assert seen == [ByImage, Gathered]
