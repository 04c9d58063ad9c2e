"""DeepSpeed beside everything else: engines one after the other, nothing said or compiled, and its absence."""

import os
import subprocess
import sys
from pathlib import Path

from fitv2_scale.config.schema import Config
from fitv2_scale.parallel.world import join
from tests.support.layout_grid import (
    Cell,
    Trace,
    engine_of,
    make_config,
    steps_of,
)
from tests.support.ranks import run_ranks


def train_twice(config: Config) -> list[Trace]:
    """Two engines, one after the other, in one process and group; then a third in a group of its own."""
    traces = []
    for engines in (2, 1):
        with join() as world:
            traces += [steps_of(engine_of(config, world), config, Cell(1), world) for _ in range(engines)]
    return traces


def started_plainly(extensions: str) -> tuple[list[Trace], str]:
    """What was trained, and what it wrote to stdout, in a process that no launcher started."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    said = Path(extensions + ".stdout")
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        traces = train_twice(make_config("zero3"))
        sys.stdout.flush()
    return traces, said.read_text()


def test_engines_one_after_the_other_are_alike_and_quiet(tmp_path):
    ((first, second, third), said) = run_ranks(1, started_plainly, str(tmp_path / "extensions"))[0]
    assert first == second == third
    assert said == ""
    assert not (tmp_path / "extensions").exists()  # nothing was compiled


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


IMPORT = """
import os, sys, threading, torch
def seen(): return torch.nn.functional.linear, os.environ.get("DS_ACCELERATOR"), threading.active_count()
before = seen()
import fitv2_scale.parallel.zero3
assert seen() == before, seen()
assert "mlflow" not in sys.modules
import mlflow
"""


def test_importing_it_says_and_changes_nothing():
    done = python(IMPORT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_deepspeed_it_is_a_sentence():
    done = python("import sys; sys.modules['deepspeed'] = None; import fitv2_scale.parallel.zero3")
    assert done.stderr.splitlines()[-1] == (
        "data_sharding.errors.UserError: layout.engine=zero3 needs DeepSpeed: pip install -e '.[zero3]'"
    )
