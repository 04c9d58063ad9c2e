"""A network of blocks with written kernels: against the plain ones, in float64 and bf16, and of a frozen part."""

import pytest
import torch

from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.block_parts import BlockParts
from fitv2_scale.model.kernels import on_cuda, operators
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.model.packed_batch import Packing
from tests.support.tiny_networks import DIT, FIT
from tests.support.triton_interpreter import interpreter

LENGTHS = [6, 70, 0, 12, 0]
MODEL = {"depth": 2, "hidden": 32, "heads": 2, "classes": 5}
WAYS = [("separate", "compiled"), ("separate", "triton"), ("merged", "triton")]


def packing() -> Packing:
    image_T = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place_T = torch.cat([torch.arange(n) for n in LENGTHS])
    cu = torch.cat((torch.zeros(1), torch.tensor(LENGTHS).cumsum(0))).int()
    return Packing(cu, image_T, place_T, torch.stack((0 * place_T, place_T // 8, place_T % 8), -1), 80)


def results(config: ModelConfig, way: tuple[str, str], dtype: torch.dtype, frozen: str = "") -> dict[str, torch.Tensor]:
    """The output, and the gradients of tokens and weights, which are drawn by one seed."""
    torch.manual_seed(0)
    network = DiffusionTransformer(config, parts=BlockParts.of(config, *way))
    for name, parameter in network.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        parameter.requires_grad_(not frozen or frozen not in name)
    network = network.to(dtype)
    x_TC = torch.randn(sum(LENGTHS), 16).to(dtype).requires_grad_()
    out = network(x_TC, torch.rand(len(LENGTHS)), torch.arange(len(LENGTHS)), packing())
    out.backward(torch.randn(out.shape).to(dtype))
    grads = {name: p.grad for name, p in network.named_parameters()}
    assert all((grad is None) == bool(frozen and frozen in name) for name, grad in grads.items())
    return {"out": out.detach(), "x": x_TC.grad} | {name: grad for name, grad in grads.items() if grad is not None}


def assert_near(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], bound: float) -> None:
    """Relative to the norm of each result."""
    assert found.keys() == exact.keys()
    for name, wanted in exact.items():
        off = (found[name].double() - wanted.double()).norm() / wanted.double().norm()
        assert off <= bound, (name, off)


@pytest.mark.parametrize("adaln", ["lora", "full"])
@pytest.mark.parametrize("qk_norm", ["layernorm", "l2_scale", "none"])
def test_values_and_gradients(qk_norm, adaln):
    config = ModelConfig(**MODEL, qk_norm=qk_norm, adaln=adaln)
    exact = results(config, WAYS[0], torch.float64)
    for way in WAYS[1:]:
        assert_near(results(config, way, torch.float32), exact, 1e-5)


@pytest.mark.parametrize("switch", [DIT, FIT, {"mlp": "gelu"}, {"position": "none"}])
def test_values_and_gradients_of_other_families(switch):
    """A network without a SwiGLU has no merged one. The plain network in float32 is off by up to 1.4e-5."""
    config = ModelConfig(**MODEL | switch)
    exact = results(config, WAYS[0], torch.float64)
    for way in WAYS[1:] if config.mlp != "gelu" else WAYS[1:2]:
        assert_near(results(config, way, torch.float32), exact, 2e-5)


def test_in_bf16_they_are_as_near_as_the_plain_ones():
    config = ModelConfig(**MODEL)
    exact = results(config, WAYS[0], torch.float64)

    def off(way: tuple[str, str]) -> dict[str, float]:
        found = results(config, way, torch.bfloat16)
        return {name: float((found[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact}

    plain = off(WAYS[0])
    for way in WAYS[1:]:
        mine = off(way)
        assert all(mine[name] <= 1.5 * plain[name] + 2**-9 for name in exact)
        assert sum(mine.values()) <= 1.05 * sum(plain.values())


@pytest.mark.parametrize("frozen", ["weight", "bias", "blocks.0", "adaLN"])
def test_what_is_frozen_gets_no_gradient(frozen):
    config = ModelConfig(**MODEL)
    exact = results(config, WAYS[0], torch.float64, frozen)
    for way in WAYS[1:]:
        assert_near(results(config, way, torch.float32, frozen), exact, 1e-5)


def test_with_the_kernels_themselves():
    config = ModelConfig(**MODEL)
    with interpreter() as call:
        found = call(in_triton, config)
    exact = results(config, WAYS[0], torch.float64)
    for of_way in found:
        assert_near(of_way, exact, 1e-5)


def in_triton(config: ModelConfig) -> list[dict[str, torch.Tensor]]:
    for name in on_cuda.MODULES:
        setattr(operators, name, on_cuda.kernel(name))
    return [results(config, way, torch.float32) for way in WAYS[1:]]
