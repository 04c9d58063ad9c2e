"""What tests of chains of jobs share: the cluster, the program, and ways to look at a run that trains elsewhere.

Everything waits for a condition; how long that takes is the machine's affair.
"""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from fitv2_scale.cli.__main__ import main
from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from tests.services.slurm import Slurm
from tests.support.waiting import wait


@pytest.fixture
def job_config(tiny, tmp_path):
    """``job_config("name", train__steps=10)``: a YAML file of conftest's tiny config, for a cluster without GPUs."""

    def write(name: str = "run", **changes) -> str:
        site = {"slurm__gpus": "none", "slurm__tasks_per_node": 1, "slurm__walltime": "10", "slurm__doctor": False}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tiny(name, **site | changes).model_dump(mode="json")))
        return str(path)

    return write


@pytest.fixture
def fitv2(capfd):
    """Runs the program; gives what it printed. Fails if its exit code is not ``code``."""

    def run(*words: str, code: int = 0) -> str:
        got = main(list(words))
        said = capfd.readouterr()
        assert got == code, said.err
        return said.out if code == 0 else said.err

    return run


def queue(slurm: Slurm) -> list[str]:
    return slurm.run("squeue", "--noheader", "--format=%i %T").splitlines()


def wait_for_the_end(slurm: Slurm) -> None:
    wait("an empty queue", lambda: not queue(slurm))


def attempts(run: str) -> list[tuple]:
    return [(a["attempt"], a["code"]) for a in status(Run.open(run))["attempts"]]


def story(run: str) -> str:
    """For a failed assertion: everything that jobs have said."""
    texts = [f"== {file}\n{file.read_text()}" for file in sorted(Path(run, "jobs").rglob("*.out"))]
    texts += [f"== {file}\n{file.read_text()[-3000:]}" for file in sorted(Path(run, "jobs").rglob("rank-*.log"))]
    return "\n".join(texts)


def has_pending(process: int, number: int) -> bool:
    """Whether a signal has been sent to a process that has not taken it yet."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return any(int(fields[field], 16) >> (number - 1) & 1 for field in ("SigPnd", "ShdPnd"))


def running(slurm: Slurm) -> str | None:
    """The one job that runs, if one does."""
    found = [line.split()[0] for line in queue(slurm) if line.endswith("RUNNING")]
    assert len(found) < 2, "two live chains"
    return found[0] if found else None


def end_of(run: str, attempt: int) -> dict | None:
    file = Path(run, f"attempts/{attempt}/end.json")
    with suppress(FileNotFoundError, ValueError):
        return json.loads(file.read_text())
    return None
