"""srun and mpirun start ranks: what each is told, and what is refused."""

import os
import subprocess
import sys

import pytest
import yaml

from data_sharding.launched import ON_NODE
from fitv2_scale.cli.__main__ import main
from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from launchers.rank import become_a_rank
from tests.support.run_history import audited

TWO_NODES = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SECOND_OF_TWO = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "n[03-04]",
    "SLURM_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OTHERS = ("OMP_NUM_THREADS", "FITV2_NODES", "CUDA_VISIBLE_DEVICES", ON_NODE)


@pytest.fixture
def environment(monkeypatch):
    """Sets variables for a test, and takes those back that it gets."""

    def change(**variables: str) -> None:
        for name in RANK + OTHERS:
            monkeypatch.setenv(name, "")  # so that it is restored
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return change


def test_mpirun_on_several_nodes_needs_a_place_to_meet(environment, capsys):
    environment(**TWO_NODES)
    assert main(["train", "configs/demo.yaml"]) == 2
    assert "mpirun -x MASTER_ADDR=node1 -x MASTER_PORT=29500" in capsys.readouterr().err
    environment(**TWO_NODES, MASTER_ADDR="n7", MASTER_PORT="29500")
    assert become_a_rank() == "mpirun"
    assert [os.environ[name] for name in RANK] == ["3", "4", "1", "2", "n7", "29500"]


def test_a_task_of_srun_is_a_rank_of_the_step(environment):
    environment(**SECOND_OF_TWO)
    assert become_a_rank() == "srun"
    port = 10_000 + 4711 * 16 % 20_000
    assert [os.environ[name] for name in RANK] == ["1", "2", "0", "1", "n03", str(port)]
    assert os.environ["FITV2_NODES"] == "n03:1,n04:1"


@pytest.mark.parametrize(("visible", "local"), [("5", "0"), ("4,5", "1"), ("", "1"), (None, "1")])
def test_a_rank_that_sees_one_gpu_has_that_one(environment, visible, local):
    """Whoever has started it: Slurm, or a script that gives each process its GPU."""
    torchrun = dict(zip(RANK, ("3", "4", "1", "2", "n7", "29500"), strict=True))
    mpirun = TWO_NODES | {"MASTER_ADDR": "n7", "MASTER_PORT": "29500"}
    for started in (torchrun, mpirun, SECOND_OF_TWO | {"SLURM_LOCALID": "1"}):
        environment(**started | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
        become_a_rank()
        assert (os.environ["LOCAL_RANK"], os.environ[ON_NODE]) == (local, "1")
        for name in started:
            os.environ.pop(name)


@pytest.mark.parametrize("words", [["--processes", "2"], ["--processes", "0"]])
def test_processes_without_a_supervisor_are_refused(words, capsys):
    assert main(["train", "configs/demo.yaml", *words]) == 2
    assert f"--processes {words[1]} needs --supervise" in capsys.readouterr().err


def test_each_of_several_processes_does_not_supervise(environment, monkeypatch, capsys):
    environment(RANK="0", WORLD_SIZE="2", MASTER_ADDR="n7", MASTER_PORT="29500")
    monkeypatch.setattr("fitv2_scale.cli.common.tell_ranks", lambda error: None)  # there are no others
    assert main(["train", "configs/demo.yaml", "--supervise"]) == 2
    assert "--supervise starts the processes itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    "variables,said",
    [
        (
            {"RANK": "abc"},
            "fitv2: RANK is 'abc' (not a whole number from 0), WORLD_SIZE is not set, MASTER_ADDR is not",
        ),
        (dict.fromkeys(RANK, "abc"), "fitv2: RANK is 'abc' (not a whole number from 0), WORLD_SIZE is 'abc' (not a"),
        (
            {"WORLD_SIZE": "2"},
            "fitv2: WORLD_SIZE is 2, RANK is not set, MASTER_ADDR is not set, MASTER_PORT is not set",
        ),
    ],
)
def test_variables_that_make_no_rank_are_refused_in_a_sentence(environment, capsys, tmp_path, variables, said):
    environment(**variables)
    assert main(["train", "configs/demo.yaml", f"run={tmp_path}/run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said) and not (tmp_path / "run").exists()
    environment(**variables)
    assert main(["status", str(tmp_path)]) == 2  # which asks for no rank, and has an error of its own
    assert "is not a run" in capsys.readouterr().err


def test_variables_are_refused_before_the_others_are_told_of_anything(environment, capsys):
    environment(RANK="0", WORLD_SIZE="abc", MASTER_ADDR="n7", MASTER_PORT="29500")
    assert main(["train", "none.yaml"]) == 2
    assert capsys.readouterr().err.startswith("fitv2: RANK is 0, WORLD_SIZE is 'abc' (not a whole number from 1):")


@pytest.mark.parametrize(("task", "says"), [("0", True), ("1", False)])
def test_the_first_task_of_srun_says_what_srun_does_not_do(environment, monkeypatch, capsys, task, says):
    environment(**SECOND_OF_TWO | {"SLURM_PROCID": task})
    monkeypatch.setattr("fitv2_scale.train.loop.train", lambda *_: 0)
    assert main(["train", "configs/demo.yaml"]) == 0
    assert ("`scancel --signal=USR1 4711` saves and ends" in capsys.readouterr().err) == says


@pytest.mark.services
def test_two_processes_of_mpirun_are_one_attempt(tiny, tmp_path):
    """As they find themselves: children of one process, with Open MPI's variables."""
    config = tiny(train__steps=3)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "fitv2_scale.cli", "train", str(file)]
    both = []
    for rank in "01":
        own = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank}
        told = os.environ | TWO_NODES | own | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
        both.append(subprocess.Popen(command, env=told, stderr=subprocess.PIPE, text=True))
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [a["code"] for a in status(Run.open(config.run))["attempts"]] == [0] and "with 2 ranks" in said[0]
    assert audited(config.run, 1) == [0, 1, 2]
