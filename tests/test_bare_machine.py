"""GPU tests start on a machine that has little more than torch, and only they see a GPU."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.support.bare_machine import environment
from tests.support.ranks import run_ranks
from tests.support.repository import ROOT

ON_RANKS = "tests/fitv2_scale/parallel/test_optimizer.py::test_the_norm_is_the_same_everywhere_and_counts_copies_once"
NOT_THERE = ("mlflow", "botocore", "s3fs", "deepspeed", "megatron", "scipy", "matplotlib", "PIL")
NOT_THERE += ("safetensors", "tqdm", "torchode", "diffusers", "webdataset", "xdist")
SD_VAE = {"tests/data_sharding/format/test_sd_vae.py"}  # left out as a whole, without diffusers
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    return environment(tmp_path)


def python(words: Sequence[str], env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)


def pytest_in(env: dict[str, str], *words: str) -> str:
    """What it prints; it has to succeed."""
    done = python(["-m", "pytest", "-q", "-p", "no:cacheprovider", *words], env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_with_gpu_tests() -> set[str]:
    files = (ROOT / "tests").rglob("test_*.py")
    return {str(file.relative_to(ROOT)) for file in files if re.search(r"\bmark\.gpu\b", file.read_text())}


def test_other_packages_cannot_be_imported_there(bare):
    """Or the tests below would prove nothing."""
    code = f"from importlib.util import find_spec; print([n for n in ('zstandard', *{NOT_THERE}) if find_spec(n)])"
    assert python(["-c", code], bare).stdout == "['zstandard']\n"


def test_gpu_tests_are_found_and_skipped_with_a_reason(bare):
    found = pytest_in(bare, "-m", "gpu", "--collect-only")
    assert {line.partition("::")[0] for line in found.splitlines() if "::" in line} == files_with_gpu_tests() - SD_VAE
    ran = pytest_in(bare | NO_GPU, "-m", "gpu")
    assert "needs a CUDA device and pytest -m gpu" in ran
    assert re.search(rf"^{found.count('::') + 1} skipped, \d+ deselected", ran, re.MULTILINE), ran


def test_ranks_start_without_the_packages_that_their_forkserver_imports(bare):
    assert "1 passed" in pytest_in(bare, ON_RANKS)


SPY = """
import os
def pytest_collection_finish():
    print("sees", repr(os.environ.get("CUDA_VISIBLE_DEVICES")))
"""


@pytest.mark.parametrize(("asked", "seen"), [("not long", ""), ("gpu or slurm", ""), ("gpu and not long", "7")])
def test_only_gpu_tests_see_a_gpu(asked, seen, tmp_path):
    (tmp_path / "spy.py").write_text(SPY)
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "7", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    assert f"sees {seen!r}" in pytest_in(
        env, "-p", "spy", "--collect-only", "-m", asked, "tests/data_sharding/test_rng.py"
    )


def test_a_rank_does_not_see_a_gpu():
    assert run_ranks(1, os.getenv, "CUDA_VISIBLE_DEVICES") == [""]


ASKS_NOT = """
import os, sys, traceback, torch
def asked(*_):
    traceback.print_stack()
    os._exit(3)
for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, asked)
import tests.support.preloaded
print("pytest" in sys.modules, "deepspeed" in sys.modules)
"""


def test_the_forkserver_never_asks_for_a_gpu_where_there_may_be_one():
    """CUDA would not survive the fork."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = python(["-c", ASKS_NOT], env)
    assert (done.returncode, done.stdout) == (0, "True False\n"), done.stderr
