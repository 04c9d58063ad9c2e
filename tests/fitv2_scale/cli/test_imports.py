"""A command that needs no torch does not import it, so that it answers in a fraction of a second.

Counted in sys.modules, on a real run and a real dataset: a command that finds nothing to do imports less.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.repository import ROOT

OLD = ROOT / "tests" / "fixtures" / "made_by_a2e80d5"
PROGRAM = """
import atexit, sys
atexit.register(lambda: print("imported:", *sorted({"torch", "mlflow"} & sys.modules.keys()), file=sys.stderr))
from fitv2_scale.cli.__main__ import main
sys.exit(main())
"""
SUBMIT = ["submit", "config.yaml", "run=new", "data.url=dataset", "slurm.tasks_per_node=2", "--dry-run"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds run/, dataset/ and config.yaml."""
    return Path(shutil.copytree(OLD, tmp_path_factory.mktemp("old"), dirs_exist_ok=True))


@pytest.mark.parametrize(
    "words,shown",
    [
        (["--help"], "usage: fitv2"),
        (["submit", "--help"], "usage: fitv2 submit"),
        (["config", "show", "config.yaml"], "optimizer.lr = 0.005"),
        (["status", "run"], "last commit at step 7"),
        (SUBMIT, "#SBATCH --nodes=1"),
        ([*SUBMIT, "--fork-from", "run@7"], "--fork-from run@7"),
        (["submit", "--dry-run", "--", "shard", "verify", "dataset"], "shard verify dataset"),
        (["plan", "config.yaml", "data.url=dataset"], "parameters"),
        (["checkpoint", "list", "run"], "step        7"),
        (["shard", "inspect", "dataset"], "24 images"),
        (["shard", "verify", "dataset"], "MB/s"),
        (["save", "run"], "attempt 2 commits at its next step"),
        (["stop", "run"], "STOP is in its log"),
    ],
    ids=" ".join,
)
def test_no_torch(folder, words, shown):
    command = [sys.executable, "-c", PROGRAM, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and shown in done.stdout, done.stderr
    assert done.stderr.splitlines()[-1] == "imported:"
