"""`fitv2 doctor` finds faults of a machine, and of one of several, before training does."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import yaml

from data_sharding.errors import UserError
from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.layout import LayoutConfig
from launchers import preflight
from launchers.compiler_check import check_compiler
from launchers.preflight import check_nodes
from tests.support.fake_cuda import FakeCuda
from tests.support.ranks import run_ranks


def as_rank(change: str, config) -> tuple[list[str], list[str], bool]:
    """Checks with a second rank that is made worse: what was checked, the faults, whether this rank has one."""
    if os.environ["RANK"] == "1" and change:
        make_worse(change)
    found = check_nodes(config)
    return [f.what for f in found.findings], found.faults, found.own_fault


def make_worse(change: str) -> None:
    if change == "version":
        preflight.installed = lambda: {"torch": "0.1"}
    if change == "disk":
        preflight.shutil.disk_usage = lambda folder: type("usage", (), {"free": 5})
    if change == "clock":
        preflight._clock_skew = lambda store, path: 7.0


def test_two_ranks_that_are_well(tiny):
    config = tiny()
    everything = ["packages", "GPU", "compiler", "temporary folder", "run folder", "data", "nodes alike", "collectives"]
    assert run_ranks(2, as_rank, "", config) == [(everything, [], False)] * 2
    assert list(Path(config.run).iterdir()) == []  # nothing is left


@pytest.mark.parametrize(
    "change,message,own_fault",
    [
        ("version", "nodes alike: nodes differ in torch: 0.1, ", [True, True]),
        ("disk", "temporary folder: rank 1: ", [False, True]),
        ("clock", "run folder: rank 1: the clock of ", [False, True]),
    ],
)
def test_one_of_two_that_is_not(tiny, change, message, own_fault):
    (_, first, first_fault), (_, second, second_fault) = run_ranks(2, as_rank, change, tiny())
    assert first == second and len(first) == 1 and first[0].startswith(message)
    assert [first_fault, second_fault] == own_fault


def beside_a_driver(cuda: str | None, folder: str) -> tuple[list[str], bool]:
    """Checks on a machine whose second rank has a GPU that torch cannot use: the faults, whether this rank has one."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if os.environ["RANK"] == "1":
        FakeCuda(1, driver=False).install(Path(tempfile.mkdtemp(dir=folder)))
    torch.version.cuda = cuda
    found = check_nodes(None)
    return found.faults, found.own_fault


def test_a_driver_that_torch_cannot_use(tmp_path):
    (first, own), (second, others) = run_ranks(2, beside_a_driver, "13.0", str(tmp_path))
    assert first == second and (own, others) == (False, True)
    (fault,) = first
    assert fault.startswith("GPU: rank 1: torch ") and "whose NVIDIA driver is 470.82.01: CUDA says" in fault


def test_a_torch_without_cuda_is_no_fault(tmp_path, monkeypatch, capsys, caplog):
    FakeCuda(0).install(tmp_path, monkeypatch.setattr)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert main(["doctor"]) == 0
    assert "is built without CUDA, so it computes on the CPU" in capsys.readouterr().out
    assert caplog.records == []  # once is enough


def test_a_machine_by_itself(tiny, capsys, tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tiny().model_dump(mode="json")))
    assert main(["doctor", str(file), "--json"]) == 0
    assert [f["fault"] for f in json.loads(capsys.readouterr().out)] == [""] * 6
    shutil.rmtree(tmp_path / "run")
    assert main(["doctor", str(file), "data.url=/no/such/set"]) == 2
    assert capsys.readouterr().err == "fitv2: not fit for training: data\n"


@pytest.mark.parametrize(
    "compiler,said",
    [
        ("echo 'no space left' >&2; exit 1", "fails (no space left), which torch.compile needs: repair it, or set"),
        ('for made; do :; done; echo junk >"$made"', "cannot be loaded ("),
    ],
)
def test_a_compiler_is_tried(compiler, said, tmp_path, monkeypatch):
    """One that works, one that does not; none; and a folder for what it makes that is none."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    compiled = LayoutConfig(compile=True)
    assert check_compiler(LayoutConfig(compile=False), on_cuda=False) == "not needed: nothing is compiled"
    assert "still empty" in check_compiler(compiled, on_cuda=False) and not any((tmp_path / "cache").glob("doctor-*"))
    bad = tmp_path / "c++"
    bad.write_text(f"#!/bin/sh\n{compiler}\n")
    bad.chmod(0o755)
    monkeypatch.setenv("CXX", str(bad))
    with pytest.raises(UserError, match=re.escape(said)):
        check_compiler(compiled, on_cuda=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(bad / "cache"))
    with pytest.raises(UserError, match="torch.compile cannot write its cache"):
        check_compiler(compiled, on_cuda=False)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no g[+][+], which torch.compile needs"):
        check_compiler(compiled, on_cuda=False)


def test_deepspeed_is_looked_at_where_it_is_used(tiny):
    ((looked_at, faults, _),) = run_ranks(1, as_rank, "", tiny(layout__engine="zero3"))
    assert looked_at[:4] == ["packages", "GPU", "compiler", "DeepSpeed"] and faults == []
