"""Kernels that a config asks for and not every GPU has: what is refused, and that training turns them on and off."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import current_flash_attention_impl, register_flash_attention_impl

from data_sharding.errors import UserError
from fitv2_scale.bench import step
from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.load import load_config, parse_config
from fitv2_scale.config.schema import Config
from fitv2_scale.model.attention import attention
from fitv2_scale.parallel import gpu_kernels
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.gpu_kernels import require_kernels, training_kernels
from fitv2_scale.parallel.rank_facts import config_facts, software_facts
from fitv2_scale.parallel.world import join
from fitv2_scale.run.differences import flatten
from fitv2_scale.run.provenance import installed
from fitv2_scale.run.run import BAD_INPUT, DONE, Run
from tests.support.layout_grid import make_config
from tests.support.ranks import run_ranks
from tests.support.repository import ROOT
from tests.support.tiny_networks import pack
from tests.support.tiny_runs import BENCHED

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
FLASH4 = {"layout__attention": "flash4", "layout__precision": "bf16"}
FP8 = {"layout__precision": "fp8", "layout__pad_to_multiple_of": 16, "model__hidden": 48}
HALF = [word.replace("fp32", "bf16") for word in BENCHED]


@pytest.fixture
def machine(monkeypatch):
    """``machine((9, 0), "4.0")``: one with a GPU of that compute capability and that version of flash-attn-4."""

    def made(capability: tuple[int, int], version: str | None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {capability}")
        monkeypatch.setattr(gpu_kernels, "installed", lambda: {"flash-attn-4": version})

    return made


@pytest.mark.parametrize(
    ("device", "capability", "version", "refusal"),
    [
        (GPU, (9, 0), "4.0", None),
        (GPU, (10, 0), "4.0", None),
        (
            GPU,
            (8, 0),
            "4.0",
            r"needs a Hopper or Blackwell GPU, and this rank computes on GPU \(8, 0\): set",
        ),
        (GPU, (12, 0), "4.0", r"needs a Hopper or Blackwell GPU"),
        (CPU, (9, 0), "4.0", "computes on the CPU: set layout.attention=auto$"),
        (GPU, (9, 0), None, "needs the package flash-attn-4: pip install flash-attn-4, or set layout.attention=auto$"),
    ],
)
def test_flash4_needs_a_gpu_and_a_package(device, capability, version, refusal, machine):
    machine(capability, version)
    layout = make_config(**FLASH4).layout
    require_kernels(make_config().layout, device)
    if refusal is None:
        require_kernels(layout, device)
        return
    with pytest.raises(UserError, match=f"^layout.attention=flash4 .*{refusal}"):
        require_kernels(layout, device)


@pytest.mark.parametrize(
    ("device", "capability", "taken"),
    [(GPU, (8, 9), True), (GPU, (9, 0), True), (GPU, (8, 6), False), (CPU, (0, 0), True)],
)
def test_fp8_needs_a_gpu_that_has_it_or_a_cpu(device, capability, taken, machine):
    machine(capability, None)
    if taken:
        require_kernels(make_config(**FP8).layout, device)
        return
    with pytest.raises(
        UserError, match=r"8.9 or more, and this rank computes on GPU \(8, 6\): set layout.precision=bf16"
    ):
        require_kernels(make_config(**FP8).layout, device)


def test_all_that_a_gpu_lacks_is_said_at_once(machine):
    machine((8, 6), "4.0")
    with pytest.raises(UserError) as refused:
        require_kernels(make_config(**FP8 | FLASH4 | {"layout__precision": "fp8"}).layout, GPU)
    eight, four = str(refused.value).split("; ")
    assert eight.startswith("layout.precision=fp8 needs a GPU of compute capability 8.9 or more")
    assert four.startswith("layout.attention=flash4 needs a Hopper or Blackwell GPU")


@pytest.mark.parametrize(
    ("version", "taken"), [("2.11.0+cu130", False), ("2.13.0", True), ("2.15.0+cu132", True), ("2.9.1", False)]
)
def test_fp8_on_a_gpu_needs_a_torch_that_compiles_it(version, taken, machine, monkeypatch):
    machine((9, 0), None)
    monkeypatch.setattr(torch, "__version__", version)
    require_kernels(make_config(**FP8).layout, CPU)
    if taken:
        require_kernels(make_config(**FP8).layout, GPU)
        return
    with pytest.raises(UserError, match=rf"^layout.precision=fp8 needs torch 2.13 or newer, not {re.escape(version)}"):
        require_kernels(make_config(**FP8).layout, GPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout__precision": "fp32"}, "does not compute in float32: set layout.precision=bf16"),
        ({"deterministic": True}, "deterministic=true is not for layout.attention=flash4"),
    ],
)
def test_flash4_suits_the_rest_of_the_config(changes, message, tiny):
    with pytest.raises(UserError, match=message):
        tiny(**FLASH4 | changes)


class Handle:
    def remove(self) -> None:
        pass


def training_on(config: Config) -> tuple[int, list[str | None], str | None]:
    """The exit code; which kernels torch has when the engine is built and at each step; and afterwards. As if each rank
    had a Hopper GPU with the package."""
    from fitv2_scale.train import loop, setup  # only here: it needs packages that GPU tests do without

    seen, make, take = [], setup.make_engine, loop.train_step
    register_flash_attention_impl("FA4", register_fn=Handle)
    setup.require_kernels = gpu_kernels.require_kernels = lambda layout, device: None
    setup.make_engine = lambda *args: (seen.append(current_flash_attention_impl()), make(*args))[1]
    loop.train_step = lambda *args: (seen.append(current_flash_attention_impl()), take(*args))[1]
    return loop.train(config), seen, current_flash_attention_impl()


def test_training_turns_flash4_on_before_the_engine_is_built_and_off_afterwards(tiny):
    """In the attempts that ask for it: a run may change it in each."""
    for steps, kernels, inside in ((2, "auto", None), (4, "flash4", "FA4"), (5, "auto", None)):
        config = tiny("run", train__steps=steps, layout__attention=kernels, layout__precision="bf16")
        taken = 2 if steps < 5 else 1
        assert run_ranks(2, training_on, config) == [(DONE, [inside] * (1 + taken), None)] * 2


def train_here(config: Config) -> int:
    from fitv2_scale.train.loop import train

    return train(config)


def test_training_refuses_it_on_all_ranks_before_the_run_is_made(tiny):
    config = tiny(**FLASH4)
    with pytest.raises(UserError, match="Hopper or Blackwell"):
        run_ranks(2, train_here, config)
    with pytest.raises(UserError, match="no run"):
        Run.open(config.run)


def test_a_command_ends_with_2(dataset, tmp_path, capsys):
    words = ["configs/fitv2_b2.yaml", f"data.url={dataset}", f"run={tmp_path}/run", "layout.attention=flash4"]
    assert main(["train", *words]) == BAD_INPUT
    assert "needs a Hopper or Blackwell GPU, and this rank computes on the CPU" in capsys.readouterr().err


def test_the_bench_of_a_step_refuses_it_too():
    with pytest.raises(UserError, match="Hopper or Blackwell"):
        step.measure(load_config("configs/demo.yaml", [*HALF, "layout.attention=flash4"]), 1, 1)


def test_ranks_compare_the_package_and_attempts_record_it():
    assert "flash-attn-4" in installed() and "version of flash-attn-4" in software_facts(CPU)
    assert config_facts(make_config(**FLASH4))["layout.attention"] == "flash4"


def test_a_run_of_before_the_keys_has_their_defaults():
    stored = json.loads((ROOT / "tests/fixtures/made_by_a2e80d5/run/run.json").read_text())["config"]
    assert "attention" not in stored["layout"]
    layout = parse_config(stored, "run.json").layout
    assert (layout.attention, layout.precision) == ("auto", "fp32")
    assert not {"attention", "precision"} & flatten(make_config(**FLASH4).recipe()).keys()


def broken() -> None:
    raise ImportError("no module named cutlass")


def test_a_package_that_torch_cannot_use(machine, monkeypatch):
    machine((9, 0), "4.0")
    monkeypatch.setitem(torch.nn.attention._registry._FLASH_ATTENTION_IMPLS, "FA4", broken)
    named = "cannot use the installed flash-attn-4 4.0: no module named cutlass; set layout.attention=auto"
    with pytest.raises(UserError, match=named), training_kernels(make_config(**FLASH4), GPU):
        raise AssertionError
    assert current_flash_attention_impl() is None


def test_what_a_block_raises_turns_it_off_too(machine, monkeypatch):
    machine((9, 0), "4.0")
    monkeypatch.setitem(torch.nn.attention._registry._FLASH_ATTENTION_IMPLS, "FA4", Handle)
    with pytest.raises(RuntimeError, match="^of a step$"), training_kernels(make_config(**FLASH4), GPU):
        assert current_flash_attention_impl() == "FA4"
        raise RuntimeError("of a step")
    assert current_flash_attention_impl() is None


def engine_without_fp8() -> None:
    torch.cuda.get_device_capability = lambda device: (8, 0)
    torch.cuda.get_device_name = lambda device: "an A100"
    config = make_config(**FP8)
    with join() as world:
        make_engine(config, config.layout.over(1), replace(world, device=GPU))


def test_a_network_for_sampling_is_refused_too():
    with pytest.raises(UserError, match="computes on an A100: set layout.precision=bf16"):
        run_ranks(1, engine_without_fp8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(installed()["flash-attn-4"] is None, reason="needs flash-attn-4")
@pytest.mark.parametrize("head_dim", [64, 72, 96])
def test_flash4_gives_what_torch_s_own_kernel_gives_on_a_gpu(head_dim):
    """Values and gradients, of images with 256, 24 and 1,000 tokens and of an empty slot, within a rounding to bf16."""
    packing, found = pack([(16, 16), (4, 6), (25, 40)], 1280, 4, 1000).to(GPU), []
    inputs = torch.randn(3, 1280, 2, head_dim, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    for keys in (FLASH4, {**FLASH4, "layout__attention": "auto"}):
        with training_kernels(make_config(**keys), GPU):
            out = attention(*inputs, packing)
            found.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-6)
