"""The high-resolution stage from the run that launchers/demo.sh leaves, by the commands that a user gives.

It takes the repository's newest finished demo; where there is none, it trains one first, as the demo does.
"""

import json
import os
import signal
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from fitv2_scale.config.load import load_config
from fitv2_scale.run.run import Run
from fitv2_scale.tracking.journal import read
from tests.support.commits import commit_bytes, read_tensors
from tests.support.memory import engine_bytes
from tests.support.rank_processes import ranks_of_config
from tests.support.ranks import run_ranks
from tests.support.repository import ROOT

FIRST, STAGE = ROOT / "configs/demo.yaml", ROOT / "configs/demo_hr.yaml"
QUIET = ("validation.every_steps=0", "sampling.every_steps=0")


def start(*words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "fitv2_scale.cli", *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )


def fitv2(*words: object) -> str:
    """What the command prints; it must end well."""
    process = start(*words)
    out, _ = process.communicate()
    assert process.returncode == 0, words
    return out


def trained(config: Path, run: Path, *overrides: str) -> Path:
    fitv2("train", config, f"run={run}", *overrides, "--supervise", "--processes", 2)
    return run


def steps_done(run: Path) -> int:
    if not (run / "run.json").exists():
        return 0
    return max((entry.fields["step"] for entry in Run.open(str(run)).log.commits()), default=0)


def crops(folder: Path, scale: int, count: int) -> str:
    """The dataset of the demo's crops, at ``scale`` times the side: up to 100 tokens or 400; the same are held out."""
    words = ("--crops", str(count), "--scale", str(scale))
    subprocess.run([sys.executable, "-m", "launchers.demo_images", folder / "crops", *words], cwd=ROOT, check=True)
    fitv2("shard", "write", folder / "crops", folder / "set", "--max-tokens", 100 * scale**2, "--holdout", 0.02)
    return str(folder / "set")


def memory(options: list[str]) -> None:
    """Of each of two ranks, persistent state and what a step adds; full training of the same network beside it."""
    held = {}
    for name, changes in (("stage", []), ("full", ['trainable=["*"]'])):
        report = json.loads(fitv2("plan", STAGE, *options, *changes, "--gpus-per-node", 2, "--json"))
        state = report["memory"]["state_bytes_per_rank"]
        found = run_ranks(2, engine_bytes, load_config(str(STAGE), [*options, *changes]), [(None,) * 4] * 2)
        assert found[0][0] == found[0][3] == state["held"]
        assert found[0][2] - found[0][0] == state["gradients"]
        assert all(other <= most for other, most in zip(found[1], found[0], strict=True))
        held[name] = state
    assert held["stage"]["moments"] < 0.3 * held["full"]["moments"]
    assert held["stage"]["gradients"] < 0.3 * held["full"]["gradients"]
    print(f"\n{held}")


@pytest.mark.services
def test_a_stage_in_its_smallest_form(tmp_path):
    """Every command of the long tests below, with 60 crops and a few steps; two steps teach nothing."""
    few = ["batch.images=6", "checkpoint.every_steps=1", "tracking.uri=none", *QUIET]
    small, large = crops(tmp_path / "small", 1, 60), crops(tmp_path / "large", 2, 60)
    demo = trained(FIRST, tmp_path / "demo", f"data.url={small}", "train.steps=2", *few)
    options = [f"init_from={demo}@2", f"data.url={large}", *few]
    stage = trained(STAGE, tmp_path / "stage", *options, "train.steps=2")
    assert (steps_done(demo), steps_done(stage)) == (2, 2)
    only_named_tensors_differ(demo, stage)
    assert val_loss(stage, large) > 0
    memory(options)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A run that has done all steps of configs/demo.yaml."""
    steps = load_config(str(FIRST)).train.steps
    finished = [run for run in sorted((ROOT / "runs").glob("demo-2*")) if steps_done(run) == steps]
    if finished:
        return finished[-1]
    folder = tmp_path_factory.mktemp("demo")
    data = crops(folder, 1, 2000)
    return trained(FIRST, folder / "run", f"data.url={data}", "tracking.uri=none", *QUIET)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> str:
    return crops(tmp_path_factory.mktemp("large"), 2, 2000)


@pytest.fixture(scope="module")
def options(demo, large) -> list[str]:
    return [f"init_from={demo}@{steps_done(demo)}", f"data.url={large}", "tracking.uri=none"]


@pytest.fixture(scope="module")
def stage(options, tmp_path_factory) -> Path:
    return trained(STAGE, tmp_path_factory.mktemp("stage") / "undisturbed", *options, "sampling.every_steps=0")


def only_named_tensors_differ(demo: Path, stage: Path) -> None:
    before = read_tensors(str(demo), "ema/")
    trainable = load_config(str(STAGE)).trainable
    named = {name for name in before if any(fnmatchcase(name, pattern) for pattern in trainable)}
    for kind in ("param/", "ema/"):
        after = read_tensors(str(stage), kind)
        assert after.keys() == before.keys()
        for name, tensor in after.items():
            assert torch.equal(tensor, before[name]) == (name not in named), name
    assert read_tensors(str(stage), "exp_avg/").keys() == named
    print(f"\n{len(named)} tensors differ, {len(before) - len(named)} are equal bit for bit")


def val_loss(run: Path, data: str, *overrides: str) -> float:
    """Of held-out crops, which neither stage was trained on, on one grid."""
    return json.loads(fitv2("validate", run, f"data.url={data}", *overrides, "--json"))["val_loss_ema"]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_only_the_named_tensors_change(demo, stage):
    only_named_tensors_differ(demo, stage)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_loss_on_larger_images_falls(demo, large, stage):
    rope = ("model.rope.mode=vision_ntk", "model.rope.train_side=10")
    plain, before, after = val_loss(demo, large), val_loss(demo, large, *rope), val_loss(stage, large)
    curve = {r.step: r.metrics["val_loss_ema"] for r in read(Run.open(str(stage))) if "val_loss_ema" in r.metrics}
    print(f"\nbefore, plain RoPE {plain:.4f}, VisionNTK {before:.4f}; in the stage {curve}; after {after:.4f}")
    assert after == pytest.approx(curve[max(curve)], rel=1e-6)
    assert after < 0.95 * before and after < plain


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_memory_is_as_planned(options):
    memory(options)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_and_resumed_it_equals_the_undisturbed_one(options, stage, tmp_path):
    run = tmp_path / "killed"
    process = start("train", STAGE, f"run={run}", *options, *QUIET, "--supervise", "--processes", 2)
    while not steps_done(run):
        assert process.poll() is None
        time.sleep(0.5)
    time.sleep(3)
    for pid in ranks_of_config(STAGE).values():
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == 0
    assert len(list((run / "attempts").iterdir())) == 2
    assert commit_bytes(str(run)) == commit_bytes(str(stage))
