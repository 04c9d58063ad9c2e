"""What tells a process that it is one of several: the variables that real launchers set, as they were found in them."""

import os

import pytest

from data_sharding.errors import UserError
from data_sharding.launched import Launched, launched

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
