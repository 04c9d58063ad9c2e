"""The section ``slurm``: what differs from cluster to cluster."""

import math
import re
from typing import Literal

from pydantic import Field, field_validator

from fitv2_scale.config.section import Section

# Environment for NCCL by the network between nodes. Starting points: a site's own settings go into slurm.setup.
NCCL_PROFILES: dict[str, dict[str, str]] = {
    "none": {},
    "infiniband": {"NCCL_NET": "IB", "NCCL_IB_TIMEOUT": "22"},
    "roce": {"NCCL_NET": "IB", "NCCL_IB_GID_INDEX": "3", "NCCL_IB_TIMEOUT": "22"},
    "efa": {"FI_PROVIDER": "efa"},
    "ethernet": {"NCCL_NET": "Socket"},
}


class SlurmConfig(Section):
    partition: str = Field("", description="partition of the jobs; empty: the cluster's default")
    account: str = Field("", description="account that is charged; empty: your default")
    qos: str = Field("", description="quality of service; empty: your default")
    constraint: str = Field("", description="features that nodes must have, as in h100&nvme; empty: any")
    walltime: str = Field("24:00:00", description="time limit of one job: minutes, HH:MM:SS or D-HH:MM:SS")
    tasks_per_node: int = Field(8, ge=1, description="processes per node, one per GPU")
    gpus: Literal["gres", "typed", "gpus-per-node", "none"] = Field(
        "gres",
        description="how GPUs are requested: --gres=gpu:8, --gres=gpu:TYPE:8, --gpus-per-node=8, or not at all",
    )
    gpu_type: str = Field("", description="TYPE for slurm.gpus=typed, as `sinfo -o %G` shows it")
    cpus_per_task: int = Field(0, ge=0, description="CPU cores per process; 0: the cluster's default")
    memory: str = Field("", description="memory per node, as in 480G; 0: all of it; empty: the cluster's default")
    exclusive: bool = Field(False, description="share no node with other jobs")
    extra: list[str] = Field([], description="more sbatch options, as in --mail-type=END; one #SBATCH line each")
    setup: list[str] = Field([], description="shell lines that run first, as in module load cuda; no secrets")
    wrap: str = Field("", description="command before python, as in apptainer exec --nv fitv2.sif")
    python: str = Field(
        "", description="Python interpreter of the ranks, as seen inside slurm.wrap; empty: that of `fitv2 submit`"
    )
    nccl: Literal["none", "infiniband", "roce", "efa", "ethernet"] = Field(
        "none", description="NCCL environment for the network between nodes; none: NCCL decides"
    )
    template: str = Field("", description="template of the batch script instead of launchers/train.sh.in")
    folder: str = Field(
        "", description="folder visible to all nodes, for code, config and output of jobs; empty: jobs/ in the run"
    )
    signal_seconds: int = Field(
        0,
        ge=0,
        description="seconds before the time limit at which Slurm asks for a save; 0: 300, or 2 x (step + save) "
        "if that was measured to be longer",
    )
    doctor: bool = Field(True, description="check the nodes of each job before training, as `fitv2 doctor` does")
    successors: int = Field(
        0, ge=0, description="successors to queue at once, if compute nodes have no sbatch; 0: each job queues the next"
    )
    fruitless: int = Field(3, ge=1, description="jobs in a row without a new commit after which the chain ends with 93")
    exclude_minutes: float = Field(120.0, ge=0, description="minutes for which a failed node is excluded")
    on_event: str = Field(
        "",
        description="shell command run as COMMAND EVENT RUN REASON when the chain ends (done, stopped, bad-input, "
        "not-finite, no-progress, gave-up, no-successor), and when the watchdog ends an attempt (hung)",
    )

    @property
    def walltime_seconds(self) -> float:
        return seconds_of(self.walltime)

    @field_validator("setup", "extra")
    @classmethod
    def _lines_are_single(cls, lines: list[str]) -> list[str]:
        if many := [line for line in lines if "\n" in line]:
            raise ValueError(f"{many[0]!r} is several lines; give each as an item of its own")
        return lines


def seconds_of(time: str) -> float:
    """Of a time as sbatch takes it and sinfo prints it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; endless
    if it is 0, which asks sbatch for no limit, or none of these, since Slurm may know better."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        return math.inf
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)  # hours
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((24 * int(days or 0) + hours) * 60 + minutes) * 60 + seconds or math.inf
