"""The network: exact sizes and names, zero at first, and each image blind to its neighbours in the pack."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fitv2_scale.config.load import load_config
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.attention import by_image, padded_sdpa
from fitv2_scale.model.counts import logical_shapes, parameter_count
from fitv2_scale.model.gather import to_tokens
from fitv2_scale.model.init import fill_initial
from fitv2_scale.model.linear import Role
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.model.packed_batch import Packing
from fitv2_scale.model.rope import by_channel, rope_table, rotate
from tests.support.tiny_networks import SWITCHES, TINY, build, pack

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize(
    "name,parameters,tensors",
    [
        ("fitv2_b2", 128_149_072, 223),
        ("fitv2_xl2", 671_045_776, 517),
        ("fitv2_3b2", 2_971_928_080, 573),
        ("fitv2_s2", 32_334_640, 223),
        ("fitv2_l2", 414_888_256, 405),
    ],
)
def test_parameter_counts(name, parameters, tensors):
    model = load_config(f"configs/{name}.yaml").model
    assert parameter_count(model) == parameters
    assert len(logical_shapes(model)) == tensors


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", ["fitv2_s2", "fitv2_xl2", "fitv2_3b2"])
def test_names_and_shapes_are_the_networks_own(name, switch):
    model = load_config(f"configs/{name}.yaml").model.model_copy(update=switch)
    with torch.device("meta"):
        built = [(name, tuple(p.shape)) for name, p in DiffusionTransformer(model).named_parameters()]
    assert list(logical_shapes(model).items()) == built


def test_public_names_and_shapes_of_xl():
    shapes = logical_shapes(load_config("configs/fitv2_xl2.yaml").model)
    d, f, r = 1152, 3072, 288
    expected = {
        "x_embedder.proj": (d, 16),
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "global_adaLN_modulation.1": (6 * d, d),
        "final_layer.linear": (16, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    for i in range(36):
        expected |= {
            f"blocks.{i}.attn.qkv": (3 * d, d),
            f"blocks.{i}.attn.proj": (d, d),
            f"blocks.{i}.mlp.fc1_g": (f, d),
            f"blocks.{i}.mlp.fc1_x": (f, d),
            f"blocks.{i}.mlp.fc2": (d, f),
            f"blocks.{i}.adaLN_modulation.1": (r, d),
            f"blocks.{i}.adaLN_modulation.2": (6 * d, r),
        }
    tensors = {"y_embedder.embedding_table.weight": (1001, d)}
    for name, shape in expected.items():
        tensors |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert shapes == tensors


@pytest.mark.parametrize("switch", SWITCHES)
def test_first_output_is_exactly_zero(switch):
    network = build(TINY.model_copy(update=switch), zero=True)
    packing, channels = pack([(3, 4), (2, 5)], 32, 4, 12), 4 * switch.get("patch", 2) ** 2
    out = network(torch.randn(32, channels), torch.rand(4), torch.tensor([0, 3, 0, 0]), packing)
    assert torch.equal(out, torch.zeros(32, channels * switch.get("outputs", 1)))


def test_initial_distributions():
    config = ModelConfig(depth=1, hidden=256, heads=4)
    values = {n: p.detach() for n, p in build(config, zero=True).named_parameters()}
    for name in ("attn.qkv", "mlp.fc1_g", "adaLN_modulation.1"):
        weight = values[f"blocks.0.{name}.weight"]
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.999 * bound < weight.abs().max() < bound
        assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    for name in ("y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"):
        assert values[name].std() == pytest.approx(0.02, rel=0.02)
        assert values[name].mean() == pytest.approx(0, abs=1e-3)
    for name, value in values.items():
        zero = name.endswith(".bias") or name.split("blocks.0.")[-1] in (
            "adaLN_modulation.2.weight",
            "global_adaLN_modulation.1.weight",
            "final_layer.adaLN_modulation.1.weight",
            "final_layer.linear.weight",
        )
        assert bool(value.any()) != zero, name


def test_any_box_of_a_tensor_can_be_drawn_alone():
    shape, name = (37, 30), "blocks.0.attn.qkv.weight"
    whole = torch.empty(shape)
    fill_initial(whole, name, shape, (0, 0), 5, TINY)
    for rows, columns in ((slice(0, 1), slice(0, 30)), (slice(11, 37), slice(0, 30)), (slice(3, 20), slice(7, 22))):
        box = torch.empty(whole[rows, columns].shape)
        fill_initial(box, name, shape, (rows.start, columns.start), 5, TINY)
        assert torch.equal(box, whole[rows, columns])
    other = torch.empty(shape)
    fill_initial(other, "blocks.1.attn.qkv.weight", shape, (0, 0), 5, TINY)
    assert not torch.equal(other, whole)


@pytest.mark.parametrize("switch", SWITCHES)
def test_packed_equals_alone_forward_and_gradient(switch):
    """An image's output, and the gradient it sends, are those of the image by itself, whatever lies around it."""
    config = TINY.model_copy(update=switch)
    sizes, channels = [(3, 4), (1, 7), (4, 4), (2, 3)], config.token_channels
    torch.manual_seed(0)
    latents = [torch.randn(h * w, channels) for h, w in sizes]
    upstream = [torch.randn(h * w, config.outputs * channels) for h, w in sizes]
    t, label = torch.rand(len(sizes)), torch.tensor([1, 5, 0, 3])

    alone, network = [], build(config)
    for i, (h, w) in enumerate(sizes):
        out = network(latents[i], t[i : i + 1], label[i : i + 1], pack([(h, w)], h * w, 1, h * w))
        out.backward(upstream[i])
        alone.append(out.detach())
    expected = {n: p.grad for n, p in network.named_parameters()}

    for order, tokens, slots in (([0, 1, 2, 3], 41, 5), ([2, 0, 3, 1], 64, 9), ([3, 2, 1, 0], 100, 12)):
        network = build(config)
        packing = pack([sizes[i] for i in order], tokens, slots, 16)
        padding = tokens - sum(len(latents[i]) for i in order)
        x = torch.cat([latents[i] for i in order] + [1e3 * torch.randn(padding, channels)])
        gradient = torch.cat([upstream[i] for i in order] + [torch.zeros(padding, upstream[0].shape[1])])
        empty = slots - len(order)
        times, labels = torch.cat([t[order], torch.rand(empty)]), F.pad(label[order], (0, empty))
        out = network(x, times, labels, packing)
        out.backward(gradient)
        torch.testing.assert_close(out[: tokens - padding], torch.cat([alone[i] for i in order]), rtol=1e-5, atol=1e-5)
        for name, p in network.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def softmax_attention(q_THD, k_THD, v_THD, cu: list[int]):
    """By its formula, over one image after the other."""
    outs = []
    for begin, end in pairwise(cu):
        q, k, v = (x[begin:end] for x in (q_THD, k_THD, v_THD))
        weight = (torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weight, v))
    return torch.cat(outs)


@pytest.mark.parametrize("kernel", [by_image, padded_sdpa])
def test_attention_by_its_formula(kernel):
    """Values and gradients of both kernels for a CPU, in float64; two of the slots hold no tokens."""
    torch.manual_seed(0)
    sizes, tokens = [(3, 4), (5, 2), (1, 1)], 25
    packing = pack(sizes, tokens, 8, 12)
    assert packing.lengths == [12, 10, 1, 2, 0, 0, 0, 0]
    q, k, v = (torch.randn(tokens, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, expected = kernel(q, k, v, packing), softmax_attention(q, k, v, packing.cu_seqlens_I1.tolist())
    torch.testing.assert_close(out, expected)
    gradient = torch.randn_like(out)
    for found, exact in zip(
        torch.autograd.grad(out, (q, k, v), gradient), torch.autograd.grad(expected, (q, k, v), gradient), strict=True
    ):
        torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("device", DEVICES)
def test_images_to_tokens_and_their_gradients_back(device):
    """Against index_select in float64; in bf16 the sum over 300 tokens is rounded once, not 300 times."""
    lengths = torch.tensor([1, 300, 7, 0, 44])
    image_T = torch.arange(5).repeat_interleave(lengths).to(device)
    x_IK = torch.randn(5, 24, dtype=torch.float64, device=device, requires_grad=True)
    gradient = torch.randn(len(image_T), 24, device=device).bfloat16()
    out, expected = to_tokens(x_IK, image_T), x_IK.index_select(0, image_T)
    assert torch.equal(out, expected)
    found, exact = (torch.autograd.grad(y, x_IK, gradient.double())[0] for y in (out, expected))
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    half = x_IK.detach().bfloat16().requires_grad_()
    (rounded,) = torch.autograd.grad(to_tokens(half, image_T), half, gradient)
    torch.testing.assert_close(rounded.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 96])
def test_varlen_kernel_against_the_fallback(head_dim):
    from fitv2_scale.model.attention import attention

    torch.manual_seed(0)
    packing = pack([(16, 16), (13, 18), (9, 28)], 1024, 8, 256)
    packing = Packing(
        **{
            n: v.cuda() if isinstance(v, torch.Tensor) else v
            for n, v in vars(packing).items()
            if n in Packing.__dataclass_fields__
        }
    )
    inputs = [torch.randn(1024, 4, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(1024, 4, head_dim, device="cuda", dtype=torch.bfloat16)
    outs = [kernel(*inputs, packing) for kernel in (attention, padded_sdpa)]
    torch.testing.assert_close(*outs, rtol=2e-2, atol=2e-2)
    grads = [torch.autograd.grad(out, inputs, gradient) for out in outs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_rope_rotates_the_first_half_by_the_row():
    """Against complex exponentials written out; with row 0 the first half of q stays as it is."""
    positions = torch.tensor([[0, 0], [0, 3], [5, 0], [4, 9]])
    q = torch.randn(4, 1, 16)
    table = by_channel(*rope_table(positions, 16, 10000.0))
    turned = rotate(q, *table).numpy()
    frequency = 10000.0 ** (-2 * np.arange(4) / 8)
    for n, (row, column) in enumerate(positions.tolist()):
        angle = np.concatenate((row * frequency, column * frequency))
        pairs = q[n, 0].double().numpy().reshape(8, 2)
        expected = (pairs[:, 0] + 1j * pairs[:, 1]) * np.exp(1j * angle)
        np.testing.assert_allclose(turned[n, 0].reshape(8, 2), np.stack((expected.real, expected.imag), -1), atol=1e-6)
    assert torch.equal(rotate(q, *table)[1, :, :8], q[1, :, :8])


def halves_apart(x, cos_TF, sin_TF):
    """The same rotation, with a formula for the first of each pair of channels and one for the second."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_TF[:, None], sin_TF[:, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).type_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_has_the_bits_of_two_formulas(dtype):
    """Forward and gradient; runs that were trained with two formulas continue with the same bits."""
    q = torch.randn(100, 3, 72).to(dtype).requires_grad_()
    cos, sin = rope_table(torch.randint(0, 40, (100, 2)), 72, 10000.0)
    gradient = torch.randn(100, 3, 72).to(dtype)
    turned = rotate(q, *by_channel(cos, sin)), halves_apart(q, cos, sin)
    assert turned[0].dtype == dtype and torch.equal(*turned)
    assert torch.equal(*(torch.autograd.grad(out, q, gradient)[0] for out in turned))


def test_rope_golden_angles():
    """head_dim 96 of 3B/2, token at row 2, column 3: h half first, 24 frequencies an axis."""
    cos, sin = rope_table(torch.tensor([[2, 3]]), 96, 10000.0)
    assert cos.shape == (1, 48)
    angle = torch.atan2(sin, cos)[0]
    assert angle[0].item() == pytest.approx(2.0) and angle[24].item() == pytest.approx(3.0)
    assert angle[1].item() == pytest.approx(2 * 10000 ** (-2 / 48)) and angle[47].item() == pytest.approx(
        3 * 10000 ** (-46 / 48), rel=1e-5
    )


def test_linear_factory_sees_every_role():
    seen: dict[tuple[int, int], set[Role]] = {}

    def linear(in_features, out_features, role):
        seen.setdefault((in_features, out_features), set()).add(role)
        return torch.nn.Linear(in_features, out_features)

    DiffusionTransformer(TINY, linear)
    assert seen[(32, 96)] == {"column"} and seen[(85, 32)] == {"row"} and seen[(32, 85)] == {"column"}


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        ModelConfig(depth=1, hidden=30, heads=4)
