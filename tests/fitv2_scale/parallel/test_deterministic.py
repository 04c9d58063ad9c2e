"""With ``deterministic``, every kernel gives the same bits each time; without it, torch's settings stay as they are."""

import os

import pytest
import torch
import torch._inductor.config

from data_sharding.errors import UserError
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.config.schema import Config
from fitv2_scale.parallel.deterministic import deterministic_kernels
from fitv2_scale.run.run import BAD_INPUT, DONE, Run
from fitv2_scale.run.status import status
from tests.support.ranks import run_ranks
from tests.support.tiny_networks import build, pack

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def settings() -> tuple[bool, bool, bool, str | None]:
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    kernels, compiled = torch.are_deterministic_algorithms_enabled(), torch._inductor.config.deterministic
    return kernels, warned, compiled, os.environ.get(CUBLAS)


@pytest.mark.parametrize(
    "before,inside", [(None, ":4096:8"), (":4096:8", ":4096:8"), (":16:8", ":16:8"), (":4096:2:16:8", ":4096:8")]
)
def test_what_is_set_and_taken_back(before, inside, monkeypatch):
    """cuBLAS' documentation names :16:8 and :4096:8 as the workspaces with which it adds in a fixed order."""
    monkeypatch.delenv(CUBLAS, raising=False)
    if before is not None:
        monkeypatch.setenv(CUBLAS, before)
    with deterministic_kernels(True):
        assert settings() == (True, False, True, inside)
    assert settings() == (False, False, False, before)
    with deterministic_kernels(False):
        assert settings() == (False, False, False, before)
    with pytest.raises(ZeroDivisionError), deterministic_kernels(True):
        _ = 1 / 0
    assert settings() == (False, False, False, before)


def write_twice() -> None:
    """Torch has no deterministic form of this."""
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_an_operation_without_such_a_kernel_is_named():
    named = "has no deterministic kernel for put_ here: set deterministic=false"
    with pytest.raises(UserError, match=named), deterministic_kernels(True):
        write_twice()
    with deterministic_kernels(False):
        write_twice()
    with pytest.raises(RuntimeError, match="size"), deterministic_kernels(True):
        torch.zeros(2) + torch.zeros(3)


def train_seeing(config: Config) -> tuple[int, list, tuple]:
    """The exit code; the settings with which the engine was built and each step was taken; those afterwards."""
    from fitv2_scale.train import loop, setup  # only here: it needs packages that GPU tests do without

    seen = []
    make, take = setup.make_engine, loop.train_step
    setup.make_engine = lambda *args: (seen.append(settings()), make(*args))[1]
    loop.train_step = lambda *args: (seen.append(settings()), take(*args))[1]
    return loop.train(config), seen, settings()


def test_training_uses_them_on_every_rank_where_a_run_asks_for_it(tiny):
    """A run that began without the key continues with it: it is no part of the recipe."""
    off, on = (False, False, False, None), (True, False, True, ":4096:8")
    for steps, taken, changes, inside in ((3, 3, {}, off), (6, 3, {"deterministic": True}, on), (8, 2, {}, off)):
        config = tiny("run", train__steps=steps, **changes)
        assert "deterministic" not in config.recipe()
        for code, seen, after in run_ranks(2, train_seeing, config):
            assert code == DONE and after == off
            assert seen == [inside] * (1 + taken)


def train_writing_twice(config: Config) -> None:
    from fitv2_scale.train import loop

    loop.train_step = lambda *args: write_twice()
    loop.train(config)


def test_training_with_an_operation_that_has_none_is_bad_input(tiny):
    config = tiny(deterministic=True)
    with pytest.raises(UserError, match="no deterministic kernel for put_"):
        run_ranks(2, train_writing_twice, config)
    (attempt,) = status(Run.open(config.run))["attempts"]
    assert attempt["code"] == BAD_INPUT and "no deterministic kernel for put_" in attempt["why"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("side,wanted", [(16, False), (16, True), (32, True)])
@pytest.mark.parametrize("heads", [3, 6])  # of 96 and 64 channels
def test_gradients_have_equal_bits_on_a_gpu(side, wanted, heads):
    """What the README says: images of 256 tokens in any case, of 1,024 with the key."""
    config = ModelConfig(depth=2, hidden={3: 288, 6: 384}[heads], heads=heads, classes=5)
    packing = pack([(side, side)] * 16, 16 * side**2, 16, side**2).to(torch.device("cuda"))
    inputs = torch.randn(16 * side**2, 16, device="cuda"), torch.rand(16, device="cuda")
    with deterministic_kernels(wanted):
        network = build(config).to("cuda", torch.bfloat16)
        found = []
        for _ in range(20):
            out = network(*inputs, torch.ones(16, dtype=torch.int64, device="cuda"), packing)
            found.append(torch.autograd.grad(out.float().square().sum(), list(network.parameters())))
    for gradients in found[1:]:
        assert all(map(torch.equal, gradients, found[0]))
