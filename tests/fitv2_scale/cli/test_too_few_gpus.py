"""Two processes on a machine with one GPU: every command that starts on several ranks computes on the CPU, and CUDA,
which would begin on the one GPU in both, never begins."""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from fitv2_scale.cli.__main__ import main
from fitv2_scale.parallel import world
from fitv2_scale.train.loop import DONE, train
from launchers.supervise import Signals, run_processes
from tests.support.commits import commit_bytes
from tests.support.evaluations import network_options
from tests.support.fake_cuda import FakeCuda
from tests.support.ranks import run_ranks
from tests.support.run_history import trained
from tests.support.tiny_runs import BENCHED

SAID = "this machine has 1 GPU for 2 ranks: all compute on the CPU; start one rank for each GPU to use it"


def run_beside_a_gpu(words: list[str], folder: str) -> tuple[int, list[str], int]:
    """Exit code, what this rank is warned of as it joins, and with how many GPUs CUDA has begun."""
    warned = []
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    cuda = FakeCuda(1).install(Path(tempfile.mkdtemp(dir=folder)))
    world.log.addFilter(lambda record: warned.append(record.getMessage()))
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    return code, warned, cuda.begun or 0


def assert_on_the_cpu(words: list[str], folder: Path) -> None:
    assert run_ranks(2, run_beside_a_gpu, words, str(folder)) == [(0, [SAID], 0), (0, [], 0)]


def test_weights_are_put_to_use(two_step_run, dataset, feature_network, reference, photographs, tmp_path):
    few = ["--size", "32x48", "--steps", "2"]
    assert_on_the_cpu(["sample", two_step_run, *few, "--out", str(tmp_path / "grid.png")], tmp_path)
    held_out = [f"validation.url={dataset}", "validation.images=8", "validation.timesteps=2"]
    assert_on_the_cpu(["validate", two_step_run, *held_out], tmp_path)
    measured = [*network_options(feature_network), "--reference", reference]
    images = ["--images", "30", "--out", str(tmp_path / "out")]
    assert_on_the_cpu(["evaluate", two_step_run, *measured, *few, *images], tmp_path)
    assert_on_the_cpu(["evaluate", photographs, *measured, "--size", "32x48"], tmp_path)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_a_run_is_trained(tiny, tmp_path, engine):
    """Compiled or not is decided by the device, and so is the accelerator of DeepSpeed."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tiny(layout__engine=engine).model_dump(mode="json")))
    assert_on_the_cpu(["train", str(file)], tmp_path)
    assert len(trained(str(tmp_path / "run"))) == 6


def test_a_node_is_checked_and_a_step_and_a_save_are_measured(tmp_path):
    assert_on_the_cpu(["doctor"], tmp_path)
    assert_on_the_cpu(["bench", "step", "configs/demo.yaml", *BENCHED, "--steps", "1", "--repeats", "1"], tmp_path)
    assert_on_the_cpu(["bench", "checkpoint", "configs/demo.yaml", *BENCHED, "--saves", "1"], tmp_path)


@pytest.mark.parametrize("visible", [None, "0"])
def test_processes_of_the_supervisor(tiny, tmp_path, monkeypatch, capfd, visible):
    """Those of `fitv2 train --supervise --processes 2`, as the demo starts them."""
    config = tiny()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    program = (
        "import pathlib, sys, tempfile; from fitv2_scale.cli.__main__ import main; "
        "from tests.support.fake_cuda import FakeCuda; FakeCuda(1).install(pathlib.Path(tempfile.mkdtemp())); "
        f"sys.exit(main(['train', {str(tmp_path / 'config.yaml')!r}]))"
    )
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert run_processes([sys.executable, "-c", program], 2, Signals()).code == 0
    assert capfd.readouterr().err.count(SAID) == 1
    without = tiny("without")
    assert run_ranks(2, train, without) == [DONE] * 2
    assert commit_bytes(config.run) == commit_bytes(without.run)
