"""Which of several processes this one is, from the variables that torchrun, srun and mpirun set."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from data_sharding.errors import UserError

# torchrun's; then those of Open MPI, MVAPICH, and MPICH and Intel MPI (Hydra). mpirun may itself use srun, once a node,
# so Slurm's variables come last.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MPI = (
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class Launched:
    """One of ``size`` processes."""

    launcher: str  # torchrun, mpirun or srun
    rank: int
    size: int
    local: tuple[int, int] | None = None  # rank and size among those of its node; None for srun


def launched(environment: Mapping[str, str]) -> Launched | None:
    """None for a process that is the only one. Raises UserError if there are others, and which one this is cannot be
    told."""
    for names in (_TORCHRUN, *_MPI):
        if all(name in environment for name in names):
            rank, size, *local = (int(environment[name]) for name in names)
            launcher = "torchrun" if names is _TORCHRUN else "mpirun"
            return Launched(launcher, rank, size, (local[0], local[1])) if size > 1 else None
    if _is_slurm_task(environment):
        return Launched("srun", int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"]))
    if (size := environment.get("PMI_SIZE", "1")) != "1" and "SLURM_JOB_ID" not in environment:
        raise UserError(
            f"this is one of {size} processes of a launcher that is not known here (PMI_SIZE is set): start them with "
            f"torchrun, srun or mpirun, or set {', '.join(_TORCHRUN)}, MASTER_ADDR and MASTER_PORT"
        )
    return None


def _is_slurm_task(slurm: Mapping[str, str]) -> bool:
    """Whether this is a task of a step of several.

    That ``SLURM_NTASKS`` is set tells nothing: a shell of `salloc` and a batch script have it, too. A batch script that
    was submitted from within a step even has the variables of that step, beside the numbers of its own job.
    """
    if int(slurm.get("SLURM_STEP_NUM_TASKS", 1)) < 2 or "SLURM_PROCID" not in slurm:
        return False
    alike = ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"), ("SLURM_TASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE")
    if any(slurm.get(ours) != slurm.get(of_the_step) for ours, of_the_step in alike):
        return False
    typed = "SLURM_PTY_PORT" in slurm and slurm.get("SLURM_TASK_PID") != str(os.getpid())
    return not typed  # into the shell of `srun --pty`
