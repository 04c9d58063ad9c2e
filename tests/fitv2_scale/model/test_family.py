"""FiTv2, FiT, DiT and SiT are one network: its values and gradients are those of each family's formulas, written apart
in float64, with images of several sizes in one pack."""

import math

import pytest
import torch

from data_sharding.errors import UserError
from fitv2_scale.config.load import load_config, parse_config
from fitv2_scale.config.model import ModelConfig, SincosConfig
from fitv2_scale.model.counts import forward_flops, parameter_count
from fitv2_scale.model.sincos import sincos_table
from tests.oracle import network as apart
from tests.support.tiny_networks import DIT, FIT, SWITCHES, TINY, build, pack

SIZES = [(3, 4), (1, 7), (5, 2), (4, 4)]
TOKENS, SLOTS = 64, 8


def form_of(switch: dict) -> apart.Form:
    named = {key: value for key, value in switch.items() if key != "patch"}
    return apart.Form(channels=4 * switch.get("patch", 2) ** 2, **named)


@pytest.mark.parametrize("switch", SWITCHES)
def test_values_and_gradients_by_their_formulas(switch):
    network, form = build(TINY.model_copy(update=switch)).double(), form_of(switch)
    weights = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    assert {name: tuple(w.shape) for name, w in weights.items()} == apart.shapes(form)
    torch.manual_seed(2)
    tokens, t, label = sum(h * w for h, w in SIZES), torch.rand(SLOTS).double(), torch.tensor([1, 5, 0, 3, 0, 0, 0, 0])
    x_TC = torch.randn(TOKENS, form.channels).double()
    out = network(x_TC, t, label, pack(SIZES, TOKENS, SLOTS, 16))[:tokens]
    expected, at = [], 0
    for i, (h, w) in enumerate(SIZES):
        image = x_TC[at : at + h * w]
        expected.append(apart.velocity(weights, form, image, float(t[i].float()), int(label[i]), h, w))
        at += h * w
    exact = torch.cat(expected)
    torch.testing.assert_close(out, exact, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(exact)
    out.backward(upstream)
    gradients = torch.autograd.grad(exact, list(weights.values()), upstream)
    for (name, p), gradient in zip(network.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-6, msg=name)


SIZES_OF = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}


@pytest.mark.parametrize(
    "name,patch,parameters",
    [
        *(("s", 2, 32_865_056), ("s", 4, 32_920_448), ("s", 8, 33_142_016)),
        *(("b", 2, 130_315_808), ("b", 4, 130_426_496), ("b", 8, 130_869_248)),
        *(("l", 2, 457_840_672), ("l", 4, 457_988_224), ("l", 8, 458_578_432)),
        *(("xl", 2, 674_834_720), ("xl", 4, 675_000_704), ("xl", 8, 675_664_640)),
    ],
)
def test_parameters_of_dit_and_sit_without_the_table(name, patch, parameters):
    depth, hidden, heads = SIZES_OF[name]
    assert parameter_count(ModelConfig(depth=depth, hidden=hidden, heads=heads, **DIT | {"patch": patch})) == parameters


@pytest.mark.parametrize("name,parameters", [("b", 158_664_224), ("xl", 823_599_392)])
def test_parameters_of_fit(name, parameters):
    depth, hidden, heads = SIZES_OF[name]
    assert parameter_count(ModelConfig(depth=depth, hidden=hidden, heads=heads, **FIT)) == parameters


@pytest.mark.parametrize("name,macs", [("s", 6.06e9), ("b", 23.0e9), ("l", 80.7e9), ("xl", 118.6e9)])
def test_multiply_adds_as_published(name, macs):
    """DiT's "Gflops" at 256 x 256 pixels, where a multiply-add counts once."""
    depth, hidden, heads = SIZES_OF[name]
    model = ModelConfig(depth=depth, hidden=hidden, heads=heads, **DIT)
    assert forward_flops(model, 256) / 2 == pytest.approx(macs, rel=0.005)


def added(size: tuple[int, int], hidden: int = 16, **sincos) -> torch.Tensor:
    rows, columns = size
    packing = pack([(2, 2), size], 4 + rows * columns, 2, max(4, rows * columns))
    return sincos_table(packing, SincosConfig(**sincos), hidden)[4:]


def test_the_table_has_the_column_first():
    """Of row 5 and column 3, as numbers: w = 1, 0.1, 0.01, 0.001."""
    found = added((8, 8))[5 * 8 + 3]
    expected = [
        *(0.14112001, 0.29552021, 0.02999550, 0.00300000), *(-0.98999250, 0.95533649, 0.99955003, 0.99999550),
        *(-0.95892427, 0.47942554, 0.04997917, 0.00499998), *(0.28366219, 0.87758256, 0.99875026, 0.99998750),
    ]  # fmt: skip
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-7)
    torch.testing.assert_close(added((8, 8)), apart.table(8, 8, 16).float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (5, 40), (20, 20), (1, 3)])
def test_ei_is_the_square_table_resized_bilinearly(size):
    """By torch's own interpolation of a picture of channels."""
    square = apart.table(16, 16, 16).T.reshape(1, 16, 16, 16)
    resized = torch.nn.functional.interpolate(square, size, mode="bilinear", align_corners=False)
    found = added(size, mode="ei", train_side=16)
    torch.testing.assert_close(found, resized[0].flatten(1).T.float(), rtol=0, atol=1e-6)


def test_pi_spans_the_square_in_larger_and_in_smaller_images():
    """32 x 8 tokens at L = 16: half rows, and every second column."""
    found = added((32, 8), mode="pi", train_side=16).view(32, 8, 16)
    square = apart.table(16, 16, 16).float().view(16, 16, 16)
    torch.testing.assert_close(found[::2], square[:, ::2], rtol=0, atol=1e-6)
    half = [0.5, 0.05, 0.005, 0.0005]  # row 0.5 of column 0
    expected = [0.0] * 4 + [1.0] * 4 + [math.sin(x) for x in half] + [math.cos(x) for x in half]
    torch.testing.assert_close(found[1, 0], torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["none", "ei", "pi"])
def test_all_modes_are_one_at_the_trained_side(mode):
    torch.testing.assert_close(added((8, 8), mode=mode, train_side=8), added((8, 8)), rtol=0, atol=1e-7)


def test_each_image_of_a_pack_has_its_own_mode():
    sizes, modes = [(4, 6), (4, 6), (4, 6)], ("none", "pi", "ei")
    packing = pack(sizes, 80, 4, 24)
    configs = [SincosConfig(mode=mode, train_side=8) for mode in modes] + [SincosConfig()]
    mixed = sincos_table(packing, configs, 16)
    for i, mode in enumerate(modes):
        torch.testing.assert_close(mixed[24 * i : 24 * i + 24], added((4, 6), mode=mode, train_side=8), rtol=0, atol=0)


def refusal(**model) -> str:
    tree = {"run": "x", "data": {"url": "x"}, "train": {"steps": 1}}
    others = {key: model.pop(key, {}) for key in ("layout", "sampling")}
    with pytest.raises(Exception) as caught:
        parse_config(tree | {"model": TINY.model_dump() | model} | others, "test")
    return str(caught.value)


def test_settings_of_positions_that_the_network_does_not_have_are_refused():
    assert "rope is for position=rope" in refusal(position="sincos", rope={"mode": "pi"})
    assert "sincos is for position=sincos" in refusal(sincos={"mode": "ei"})
    assert "sampling.sincos=ei is for model.position=sincos, and it is rope" in refusal(sampling={"sincos": "ei"})
    assert "sampling.rope=pi is for model.position=rope" in refusal(position="sincos", sampling={"rope": "pi"})
    assert "is for a SwiGLU" in refusal(mlp="gelu", layout={"gate_and_value": "merged"})


def test_the_fitv2_configs_are_not_of_the_family_s_other_switches():
    model = load_config("configs/fitv2_b2.yaml").model
    assert (model.mlp, model.position, model.patch, model.outputs) == ("swiglu", "rope", 2, 1)
    assert model.token_channels == 16 and model.pixels_per_token == 16


def test_a_patch_and_the_outputs_are_numbers_in_a_file_and_on_the_command_line():
    sized = load_config("configs/fitv2_b2.yaml", ["model.patch=4", "model.outputs=2"]).model
    assert (sized.patch, sized.outputs, sized.token_channels, sized.pixels_per_token) == (4, 2, 64, 32)
    with pytest.raises(UserError, match="model.patch"):
        load_config("configs/fitv2_b2.yaml", ["model.patch=3"])
