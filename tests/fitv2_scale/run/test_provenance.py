"""The packages, code and GPUs of an attempt are recorded, and a change is reported."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from fitv2_scale.cli.__main__ import main
from fitv2_scale.run.provenance import SOURCE, nvidia_driver, own_gpu, provenance
from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from fitv2_scale.train.loop import DONE, train
from launchers.submit import write_home
from tests.support.fake_cuda import FakeCuda
from tests.support.ranks import run_ranks
from tests.support.repository import ROOT


def test_it_says_what_ran():
    made_of = provenance()
    assert json.loads(json.dumps(made_of)) == made_of
    assert made_of["packages"]["numpy"] and made_of["python"].startswith("3.") and made_of["hostname"]
    assert re.fullmatch("[0-9a-f]{16}", made_of["code"])


def test_a_gpu_is_known_by_its_node_and_its_number(monkeypatch):
    found = SimpleNamespace(name="NVIDIA H200", uuid="1234-ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    assert own_gpu(torch.device("cuda", 1)) == {"node": "node7", "name": "NVIDIA H200", "uuid": "1234-ab"}
    assert own_gpu(torch.device("cpu")) is None


def test_the_driver_is_the_one_that_the_kernel_has(tmp_path):
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    assert nvidia_driver(version) == "535.104.05"
    version.write_text("something else")
    assert nvidia_driver(version) is None and nvidia_driver(tmp_path / "none") is None


def test_gpus_that_torch_cannot_use_are_not_asked(monkeypatch, tmp_path):
    """They can be counted. `fitv2 checkpoint import` needs none."""
    FakeCuda(2, driver=False).install(tmp_path, monkeypatch.setattr)
    assert provenance()["gpus"] == []


def test_a_change_between_attempts_is_reported(tiny, capfd):
    config = tiny(train__steps=2)
    assert run_ranks(1, train, config) == [DONE]
    file = Path(config.run, "attempts/1/start.json")
    start = json.loads(file.read_text())
    assert start["changed"] == [] and start["tracking"] == {"uri": "none", "experiment": "fitv2"}
    old = start | {"driver": "1.2.3", "packages": start["packages"] | {"torch": "2.0.0"}}
    file.write_text(json.dumps({key: value for key, value in old.items() if key != "code"}))  # of before it was noted
    assert run_ranks(1, train, tiny(train__steps=4)) == [DONE]
    assert run_ranks(1, train, tiny(train__steps=6)) == [DONE]
    torch = start["packages"]["torch"]
    changed = [a["changed"] for a in status(Run.open(config.run))["attempts"]]
    assert changed == [[], ["driver: 1.2.3 -> null", f"packages.torch: 2.0.0 -> {torch}"], []]
    told = Path(config.run, "attempts/2/logs/rank-00000.log").read_text()
    assert f"since attempt 1: driver: 1.2.3 -> null; packages.torch: 2.0.0 -> {torch}" in told
    assert main(["status", config.run]) == 0
    assert f"packages.torch: 2.0.0 -> {torch}" in capfd.readouterr().out


def test_a_copy_of_the_code_knows_where_it_came_from(tiny, tmp_path):
    """The copy is what it is made of, digest and all; git is asked when it is made."""
    config = tiny()
    write_home(tmp_path / "home", config, config.run)
    copy = tmp_path / "home/code"
    (copy / SOURCE).write_text(json.dumps({"git": "4f0c-dirty", "diff": "+ line"}))
    program = "import json; from fitv2_scale.run.provenance import provenance; print(json.dumps(provenance()))"

    def of_copy() -> dict:
        command = [sys.executable, "-P", "-c", program]
        done = subprocess.run(command, env={"PYTHONPATH": str(copy)}, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    made_of = of_copy()
    assert (made_of["git"], made_of["diff"]) == ("4f0c-dirty", "+ line")
    assert made_of["code"] == provenance()["code"]
    (copy / "fitv2_scale/train/loop.py").write_text("changed = True\n")
    assert of_copy()["code"] != made_of["code"]
    attempt = Run.open_or_create(config.run, {}, {}, None).claim(made_of)
    assert Path(config.run, attempt.path, "code.diff").read_text() == "+ line"
    assert "diff" not in json.loads(Path(config.run, attempt.path, "start.json").read_text())


def test_what_git_does_not_know_is_kept(tmp_path):
    """In a clone of nothing but these packages, with one line changed."""
    for name in ("fitv2_scale", "data_sharding"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(tmp_path)], check=True)

    def git(*words: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@x.org"]
        return subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True).stdout

    def source() -> dict:
        program = "import json; from fitv2_scale.run.provenance import source; print(json.dumps(source()))"
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True,
                              env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"})  # fmt: skip
        return json.loads(done.stdout)

    assert source() == {"git": None, "diff": ""}
    git("init", "-q")
    git("add", "*.py")
    git("commit", "-qm", "x")
    head = git("rev-parse", "HEAD").decode().strip()
    assert source() == {"git": head, "diff": ""}
    (tmp_path / "fitv2_scale/train/loop.py").write_text("changed = True\n")
    said = source()
    assert said["git"] == f"{head}-dirty" and "+changed = True" in said["diff"]
