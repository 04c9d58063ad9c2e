"""What a task of a Slurm job is told before it runs a command: its rank, where compilers may cache, whether its node is
fit for training. `python -m fitv2_scale.cli.slurm_task`, which srun starts, asks here first.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.hostlist import counts, expand

if TYPE_CHECKING:
    from fitv2_scale.config.schema import Config

HELD = (signal.SIGTERM, signal.SIGUSR1)  # ask to save
_STRIDE = 16  # ports of a job: one for each time that it is requeued, and as many for examinations
_EXAMINATION = _STRIDE // 2
_PORTS = range(10_000, 30_000)  # below those that the system gives to whoever asks for none in particular


def rank_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables from those of a task of srun."""
    restart = int(slurm.get("SLURM_RESTART_COUNT", 0))
    # A requeued job has the same number, and its old processes may be alive: another port.
    port = _PORTS[(int(slurm["SLURM_JOB_ID"]) * _STRIDE + restart % _EXAMINATION) % len(_PORTS)]
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
    """Compilers' caches on the node's own disk, one folder a user: a shared file system is slow and locks badly."""
    folder = Path(tempfile.gettempdir()) / f"fitv2-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        sys.exit(f"{folder} belongs to somebody else; set TMPDIR to a folder of your own.")
    defaults = {"TRITON_CACHE_DIR": folder / "triton", "TORCHINDUCTOR_CACHE_DIR": folder / "inductor"}
    return {key: str(path) for key, path in defaults.items() if key not in environment}


def examine_node(config: "Config", node: str | None) -> int | None:
    """None if all nodes are fit for training, else this rank's exit code. The ranks of healthy nodes end with 0, so
    that srun names one that is not."""
    from launchers.preflight import examine, to_text

    port = int(os.environ["MASTER_PORT"])
    os.environ["MASTER_PORT"] = str(port + _EXAMINATION)  # training's own is not to meet what is left of it
    try:
        found = examine(config)
    finally:
        os.environ["MASTER_PORT"] = str(port)
    if os.environ["RANK"] == "0":
        print(to_text(found.findings), flush=True)
    if found.guilty:
        print(f"{node} is not fit for training: {'; '.join(found.faults)}", file=sys.stderr, flush=True)
    return int(found.guilty) if found.faults else None


if __name__ == "__main__":
    # Batch scripts of earlier versions, and templates made from them (slurm.template), start this module.
    os.execv(sys.executable, [sys.executable, "-u", "-m", "fitv2_scale.cli.slurm_task", *sys.argv[1:]])
