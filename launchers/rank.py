"""A task of a Slurm job before it runs its command: its rank, the folder for compilers' caches, the check of its node.
`python -m fitv2_scale.cli.slurm_task`, which srun starts, calls this.
"""

import os
import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from data_sharding.errors import UserError
from launchers.hostlist import counts, expand

if TYPE_CHECKING:
    from fitv2_scale.config.schema import Config

BLOCKED = (signal.SIGTERM, signal.SIGUSR1)  # they ask for a save
_PORTS_OF_A_JOB = 16  # one for each time that it is requeued, and as many for checks of its nodes
_CHECK = _PORTS_OF_A_JOB // 2
_PORTS = range(10_000, 30_000)  # below those that the system assigns itself


def rank_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables, from those of a task of srun."""
    restart = int(slurm.get("SLURM_RESTART_COUNT", 0))
    # A requeued job has the same id, and its old processes may be alive: another port.
    port = _PORTS[(int(slurm["SLURM_JOB_ID"]) * _PORTS_OF_A_JOB + restart % _CHECK) % len(_PORTS)]
    local_size = counts(slurm["SLURM_STEP_TASKS_PER_NODE"])[int(slurm["SLURM_NODEID"])]
    # Where Slurm gives each task a GPU of its own, that is the only one it sees.
    alone = len(slurm.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1 and "CUDA_VISIBLE_DEVICES" in slurm
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_RANK": "0" if alone else slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": expand(slurm["SLURM_STEP_NODELIST"])[0],
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": slurm.get("OMP_NUM_THREADS") or slurm.get("SLURM_CPUS_PER_TASK") or "1",
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
