"""What tells a process that it is one of several: the variables that real launchers set, as they were found in them."""

import os

import pytest

from data_sharding.errors import UserError
from data_sharding.launched import ON_NODE, Launched, launched, own_rank, speaks_for_node

# Of Slurm 22.05: task 1 of `srun -N2 -n2`; a shell of `salloc -N2 -n4`; a batch script of `sbatch -N2 -n4`.
TASK = {
    "SLURM_JOB_ID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_TASKS_PER_NODE": "1(x2)",
    "SLURM_TASK_PID": "2642",
}
SALLOC = {"SLURM_JOB_ID": "2", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "3,1"}
BATCH = SALLOC | {"SLURM_PROCID": "0", "SLURM_TASK_PID": "2854"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "environment,expected",
    [
        (TASK, Launched("srun", 1, 2)),
        (TASK | {"PMI_RANK": "1", "PMI_SIZE": "2"}, Launched("srun", 1, 2)),  # srun --mpi=pmi2
        (OPEN_MPI, Launched("mpirun", 3, 8, (1, 2))),
        (TASK | OPEN_MPI, Launched("mpirun", 3, 8, (1, 2))),  # Open MPI's daemons are tasks of a step
        (HYDRA, Launched("mpirun", 3, 8, (1, 2))),
        (TASK | TORCHRUN, Launched("torchrun", 3, 8, (1, 2))),  # srun torchrun
    ],
)
def test_one_of_several(environment, expected):
    assert launched(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SALLOC,
        BATCH,
        TASK | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash
        TASK | {"SLURM_PTY_PORT": "41000", "SLURM_PROCID": "0"},  # the shell of srun -n2 --pty bash
        # sbatch -n1, called in a task: it has that step's variables beside its own
        TASK | {"SLURM_JOB_ID": "8", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "1"},
        TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"},
        OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_the_only_one(environment):
    assert launched(environment) is None


def test_a_task_with_a_terminal_is_one_of_several():
    told = TASK | {"SLURM_PTY_PORT": "41000", "SLURM_TASK_PID": str(os.getpid())}
    assert launched(told) == Launched("srun", 1, 2)


def test_an_unknown_launcher_is_refused():
    with pytest.raises(UserError, match="one of 4 processes of a launcher that is not known"):
        launched({"PMI_RANK": "1", "PMI_SIZE": "4"})


BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
ADVICE = (
    ": start ranks with torchrun, srun or mpirun, or set RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT for each; for one "
    "process, unset them"
)


@pytest.mark.parametrize(
    "environment,expected",
    [
        (BY_HAND, (1, 2)),
        (BY_HAND | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, (1, 2)),
        (BY_HAND | {"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}, None),  # a batch script exports them for its tasks
    ],
)
def test_the_rank_of_a_process(environment, expected):
    assert own_rank(environment) == expected


@pytest.mark.parametrize(
    "environment,said",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, RANK is not set, MASTER_ADDR is not set, MASTER_PORT is not set"),
        ({**BY_HAND, "RANK": ""}, "RANK is empty, WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "", **{k: BY_HAND[k] for k in ("MASTER_ADDR", "MASTER_PORT")}}, "WORLD_SIZE is empty, RANK is"),
        ({"RANK": "abc"}, "RANK is 'abc' (not a whole number from 0), WORLD_SIZE is not set, MASTER_ADDR is not set,"),
        ({**BY_HAND, "RANK": "-1"}, "RANK is '-1' (not a whole number from 0), WORLD_SIZE is 2"),
        ({**BY_HAND, "WORLD_SIZE": "two"}, "RANK is 1, WORLD_SIZE is 'two' (not a whole number from 1)"),
        ({**BY_HAND, "WORLD_SIZE": "0"}, "RANK is 1, WORLD_SIZE is '0' (not a whole number from 1)"),
        ({**BY_HAND, "MASTER_ADDR": ""}, "RANK is 1, WORLD_SIZE is 2, MASTER_ADDR is empty"),
        (
            {**BY_HAND, "MASTER_PORT": "x"},
            "RANK is 1, WORLD_SIZE is 2, MASTER_PORT is 'x' (not a whole number from 1",
        ),
        (
            {**BY_HAND, "MASTER_PORT": "65536"},
            "RANK is 1, WORLD_SIZE is 2, MASTER_PORT is '65536' (not a whole number",
        ),
        ({**BY_HAND, "LOCAL_RANK": ""}, "RANK is 1, WORLD_SIZE is 2, LOCAL_RANK is empty"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1' (not a whole number from 0)"),
    ],
)
def test_variables_that_make_no_rank_are_refused(environment, said):
    """Such a process would train alone beside the others, wait for ranks that do not exist, or end in a traceback."""
    with pytest.raises(UserError) as refused:
        own_rank(environment)
    assert str(refused.value).startswith(said) and str(refused.value).endswith(ADVICE)


def test_so_are_those_that_torchrun_never_sets():
    for name in TORCHRUN:
        with pytest.raises(UserError, match=f"{name} is 'abc' .*not a whole number"):
            launched(TORCHRUN | {name: "abc"})


@pytest.mark.parametrize(
    "environment,expected",
    [
        ({}, True),
        (BY_HAND, True),  # in a terminal of its own
        (BY_HAND | {"LOCAL_RANK": "1"}, True),
        (TORCHRUN, False),
        (TORCHRUN | {"LOCAL_RANK": "0"}, True),
        (TORCHRUN | {"LOCAL_RANK": "0", ON_NODE: "1"}, False),  # it sees one GPU alone
        (TORCHRUN | {"LOCAL_RANK": "0", ON_NODE: "0"}, True),
    ],
)
def test_one_rank_speaks_for_its_node(environment, expected):
    assert speaks_for_node(environment) == expected
