"""Which of several processes this one is, from the variables that torchrun, srun and mpirun set."""

import os
import re
from collections.abc import Iterable, Mapping
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
# What torch needs of each rank, whoever started it; of the numbers, the least.
_RANK = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LEAST = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
_LAST_PORT = 65535
# This rank's number on its node. LOCAL_RANK is another one where a rank sees no GPU but its own (``launchers.rank``).
ON_NODE = "FITV2_RANK_ON_NODE"


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
            _refuse_wrong(environment, names)
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


def own_rank(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Rank and number of ranks of a process that has torchrun's variables, from whatever launcher; None without.

    Raises UserError if they make no rank, or tell of other ranks and not which this one is: it would train alone. (A
    WORLD_SIZE of 1 tells of none; MASTER_ADDR and MASTER_PORT alone do not either, many scripts export them.)
    """
    is_rank = "RANK" in environment or environment.get("WORLD_SIZE", "1") != "1"
    _refuse_wrong(environment, [*(_RANK if is_rank else ()), *(name for name in _TORCHRUN[2:] if name in environment)])
    if not is_rank:
        return None
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if rank >= size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {size}: ranks are numbered from 0 to WORLD_SIZE - 1")
    return rank, size


def _refuse_wrong(environment: Mapping[str, str], names: Iterable[str]) -> None:
    """Raises UserError, which names all of them, if variables of ``names`` are not set or are no such numbers."""
    faults = {name: fault for name in names if (fault := _fault(name, environment.get(name)))}
    if faults:
        shown = {name: f"is {environment[name]}" for name in ("RANK", "WORLD_SIZE") if name in environment} | faults
        raise UserError(
            f"{', '.join(f'{name} {fault}' for name, fault in shown.items())}: start ranks with torchrun, srun or "
            f"mpirun, or set {', '.join(_RANK)} for each; for one process, unset them"
        )


def _fault(name: str, value: str | None) -> str | None:
    if not value:
        return "is not set" if value is None else "is empty"
    if name not in _LEAST:
        return None
    least, most = _LEAST[name], _LAST_PORT if name == "MASTER_PORT" else None
    if re.fullmatch("[0-9]{1,9}", value) and least <= int(value) and (most is None or int(value) <= most):
        return None
    return f"is {value[:40]!r} (not a whole number from {least}{f' to {most}' if most else ''})"


def speaks_for_node(environment: Mapping[str, str]) -> bool:
    """Whether this rank is the first on its node; or was started by hand, so that it has a terminal of its own."""
    if not all(name in environment for name in _TORCHRUN):
        return True
    return environment.get(ON_NODE, environment["LOCAL_RANK"]) == "0"


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
