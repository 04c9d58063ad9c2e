"""A process that srun or mpirun has started, before it runs its command: its rank; and in a job of `fitv2 submit`, the
folder for compilers' caches and the check of its node (`python -m fitv2_scale.cli.slurm_task` calls these).
"""

import os
import sys
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from data_sharding.errors import UserError
from data_sharding.launched import ON_NODE, Launched, launched, own_rank
from launchers.hostlist import counts, expand

if TYPE_CHECKING:
    from fitv2_scale.config.schema import Config

_PORTS_OF_A_JOB = 16  # one for each time that it is requeued, and as many for checks of its nodes
_CHECK = _PORTS_OF_A_JOB // 2
_PORTS = range(10_000, 30_000)  # below those that the system assigns itself


def become_a_rank() -> str | None:
    """Gives this process torchrun's variables if srun or mpirun has started it as one of several. Returns the launcher,
    None for a process that is the only one. Raises UserError if the others cannot be found, or its variables make no
    rank.

    LOCAL_RANK says which of the GPUs that it sees is its own, also under torchrun.
    """
    task = launched(os.environ)
    if task is not None:
        os.environ[ON_NODE] = str(task.local[0]) if task.local else os.environ["SLURM_LOCALID"]
    if task is not None and task.launcher != "torchrun":
        found = rank_environment(os.environ) if task.launcher == "srun" else _of_mpirun(task, os.environ)
        os.environ.update(found)
    elif task is not None and _sees_one_gpu(os.environ):
        os.environ["LOCAL_RANK"] = "0"
    if "RANK" in os.environ:
        own_rank(os.environ)
    return task.launcher if task else None


def _sees_one_gpu(environment: Mapping[str, str]) -> bool:
    """Whether this process sees one GPU alone, as where Slurm or a script gives each its own."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return visible != "" and "," not in visible


def _of_mpirun(task: Launched, environment: Mapping[str, str]) -> dict[str, str]:
    assert task.local is not None
    if "MASTER_ADDR" not in environment and task.local[1] < task.size:
        raise UserError(
            "mpirun does not tell its processes on which node rank 0 runs: give them its name and a free port, as in "
            "mpirun -x MASTER_ADDR=node1 -x MASTER_PORT=29500"
        )
    # All on one node are children of one daemon of this mpirun.
    port = _PORTS[zlib.crc32(f"{os.getppid()}".encode()) % len(_PORTS)]
    return {
        "RANK": str(task.rank),
        "WORLD_SIZE": str(task.size),
        "LOCAL_RANK": "0" if _sees_one_gpu(environment) else str(task.local[0]),
        "LOCAL_WORLD_SIZE": str(task.local[1]),
        "MASTER_ADDR": environment.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1"),
    }


def rank_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables, from those of a task of srun."""
    # A requeued job has the same id, and its old processes may be alive; so may those of another step: another port.
    turn = int(slurm.get("SLURM_RESTART_COUNT", 0)) + int(slurm.get("SLURM_STEP_ID", 0))
    port = _PORTS[(int(slurm["SLURM_JOB_ID"]) * _PORTS_OF_A_JOB + turn % _CHECK) % len(_PORTS)]
    nodes, sizes = expand(slurm["SLURM_STEP_NODELIST"]), counts(slurm["SLURM_STEP_TASKS_PER_NODE"])
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_RANK": "0" if _sees_one_gpu(slurm) else slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(sizes[int(slurm["SLURM_NODEID"])]),
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": slurm.get("OMP_NUM_THREADS") or slurm.get("SLURM_CPUS_PER_TASK") or "1",
        "FITV2_NODES": ",".join(f"{node}:{ranks}" for node, ranks in zip(nodes, sizes, strict=False)),
    }


def cache_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for compilers' caches on the node's own disk: a shared file system is slow and locks badly."""
    from fitv2_scale.run.local_files import user_folder  # only here: ``slurm_task`` blocks signals before slow imports

    try:
        folder = user_folder()
    except UserError as error:
        sys.exit(str(error))  # code 1: another node may be fine
    defaults = {"TRITON_CACHE_DIR": folder / "triton", "TORCHINDUCTOR_CACHE_DIR": folder / "inductor"}
    return {key: str(path) for key, path in defaults.items() if key not in environment}


def check_node(config: "Config", node: str | None) -> int | None:
    """None if all nodes are fit for training, else this rank's exit code. The ranks of healthy nodes exit with 0, so
    that srun names one that is not."""
    from launchers.preflight import check_nodes, to_text

    port = int(os.environ["MASTER_PORT"])
    os.environ["MASTER_PORT"] = str(port + _CHECK)  # another one than training's, where connections may linger
    try:
        found = check_nodes(config)
    finally:
        os.environ["MASTER_PORT"] = str(port)
    if os.environ["RANK"] == "0":
        print(to_text(found.findings), flush=True)
    if found.own_fault:
        print(f"{node} is not fit for training: {'; '.join(found.faults)}", file=sys.stderr, flush=True)
    return int(found.own_fault) if found.faults else None


if __name__ == "__main__":
    # Batch scripts of earlier versions, and templates made from them (slurm.template), start this module.
    os.execv(sys.executable, [sys.executable, "-u", "-m", "fitv2_scale.cli.slurm_task", *sys.argv[1:]])
