"""A block made of other parts computes the same: against float64."""

import numpy as np
import pytest
import torch

from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.block import MergedSwiGLU, SwiGLU
from fitv2_scale.model.linear import plain_linear

MODEL = ModelConfig(depth=1, hidden=96, heads=2, classes=5)  # a SwiGLU of 256 units


def exact(x, weights, gradient):
    """Result and gradients in NumPy's float64, by their formulas: names as of the module's parameters, and x."""
    wg, wx, w2 = (weights[f"{name}.weight"] for name in ("fc1_g", "fc1_x", "fc2"))
    gate, value = x @ wg.T + weights["fc1_g.bias"], x @ wx.T + weights["fc1_x.bias"]
    sigmoid = 1 / (1 + np.exp(-gate))
    hidden = gate * sigmoid * value
    d_hidden = gradient @ w2
    d_gate = d_hidden * value * sigmoid * (1 + gate * (1 - sigmoid))
    d_value = d_hidden * gate * sigmoid
    found = {"fc2.weight": gradient.T @ hidden, "fc2.bias": gradient.sum(0), "x": d_gate @ wg + d_value @ wx}
    for name, d in (("fc1_g", d_gate), ("fc1_x", d_value)):
        found |= {f"{name}.weight": d.T @ x, f"{name}.bias": d.sum(0)}
    return {"out": hidden @ w2.T + weights["fc2.bias"], **found}


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_gate_and_value_as_one_product(dtype, bound):
    """Both forms, of the same names, are as near to float64: relative to the norm of each result."""
    torch.manual_seed(0)
    shapes = {name: p.shape for name, p in SwiGLU(MODEL, plain_linear).named_parameters()}
    weights = {name: (torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for name, shape in shapes.items()}
    x, gradient = torch.randn(200, 96).to(dtype), torch.randn(200, 96).to(dtype)
    doubles = {n: w.double().numpy() for n, w in weights.items()}
    expected = exact(x.double().numpy(), doubles, gradient.double().numpy())
    for kind in (SwiGLU, MergedSwiGLU):
        mlp = kind(MODEL, plain_linear).to(dtype)
        mlp.load_state_dict(weights)
        leaf = x.clone().requires_grad_()
        out = mlp(leaf)
        out.backward(gradient)
        found = {"out": out, "x": leaf.grad} | {n: p.grad for n, p in mlp.named_parameters()}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            off = np.linalg.norm(found[name].detach().double().numpy() - value) / np.linalg.norm(value)
            assert off < bound, (kind, name, off)
