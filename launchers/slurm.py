"""Slurm's programs as functions. Each raises SlurmError with the program's error message."""

import math
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_sharding.errors import UserError
from fitv2_scale.config.slurm import seconds_of

_TIMEOUT = 120  # seconds; a busy slurmctld answers late
# Settings of the user for Slurm's programs that tell which cluster is meant; all others would change what they print,
# or are the options of the job that this runs in.
_KEPT = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"}
_DROPPED = ("SLURM_", "SBATCH_", "SQUEUE_", "SINFO_", "SCANCEL_", "SCONTROL_")
_NEVER = "Requested node configuration is not available"
_UNUSABLE = ("down", "drain", "fail", "maint", "unknown", "inval")


class SlurmError(UserError):
    """A program of Slurm failed, or is not installed."""


@dataclass(frozen=True)
class Job:
    id: str
    state: str  # as squeue's %T: PENDING, RUNNING, COMPLETING, …
    reason: str  # why it is pending, as squeue's %r
    script: str  # its path


def available() -> bool:
    """Whether this machine can talk to Slurm."""
    return shutil.which("sbatch") is not None


def sbatch(script: str, *options: str, environment: Mapping[str, str] | None = None) -> str:
    """Queues the script in the file ``script``; the job inherits this process's environment and ``environment``.
    Returns the job's id."""
    return _run("sbatch", "--parsable", *options, script, extra=environment).split(";")[0].strip()


def check(script: str, *options: str) -> None:
    """Raises SlurmError if Slurm would not accept the script with this text; queues nothing."""
    _run("sbatch", "--test-only", *options, text=script)


def most_nodes(script: str, least: int, most: int, *options: str) -> int:
    """The largest number of nodes, from ``least`` to ``most``, that Slurm could ever give to the script with this text:
    by its partition, --exclude, --nodelist, --constraint, --reservation and whatever else it asks of nodes. At least
    ``least``."""
    tried = most  # mostly it is right
    while least < most:
        if _is_possible(script, f"--nodes={tried}", *options):
            least = tried
        else:
            most = tried - 1
        tried = (least + most + 1) // 2
    return least


def _is_possible(script: str, *options: str) -> bool:
    """Any other answer of Slurm is not about the number of nodes."""
    try:
        check(script, *options)
    except SlurmError as error:
        return _NEVER not in str(error)
    return True


def queue(name: str, seconds: float = _TIMEOUT) -> list[Job]:
    """This user's jobs of that name, oldest first. Slurm has ``seconds`` to answer."""
    command = ("squeue", "--noheader", "--all", "--user", str(os.getuid()), "--name", name, "--format", "%i|%T|%r|%o")
    # With SLURM_CLUSTERS, squeue prints a line with the cluster's name.
    lines = [line.strip() for line in _run(*command, seconds=seconds).splitlines() if "|" in line]
    return sorted((Job(*line.split("|", 3)) for line in lines), key=lambda job: int(re.split(r"\D", job.id)[0]))


def cancel(jobs: Sequence[str], signal: str | None = None) -> None:
    """Cancels jobs; with ``signal``, sends that to the processes of their steps instead."""
    if jobs:
        _run("scancel", *(["--signal", signal] if signal else []), *jobs)


def set_pending(job: str, nodes: int, tasks: int, excluded: Sequence[str]) -> None:
    """Changes the size and the excluded nodes of a pending job, which keeps its place in the queue."""
    _run("scontrol", "update", f"JobId={job}", f"NumTasks={tasks}", f"NumNodes={nodes}-{nodes}")
    _run("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(excluded)}")


def do_not_requeue(job: str) -> None:
    _run("scontrol", "update", f"JobId={job}", "Requeue=0")


def requeue(job: str) -> None:
    """Ends a running job, and queues it again under its number."""
    _run("scontrol", "update", f"JobId={job}", "Requeue=1")
    _run("scontrol", "requeue", job)


def partitions() -> list[str]:
    return sorted(set(_run("sinfo", "--noheader", "--format", "%R").split()))


def usable_nodes(partition: str) -> list[str]:
    """Names of the nodes that are up, busy or not, of ``partition``: one or several as in "a,b", hidden ones too; if
    that is empty, of the default partition."""
    return sorted({name for name, state in _of_partition(partition, "%N|%T", "--Node") if is_usable(state)})


def time_limit(partition: str) -> float:
    """Seconds that a job may take in ``partition`` (as for ``usable_nodes``): the longest limit. Endless if Slurm does
    not know the partition."""
    return max((seconds_of(limit) for (limit,) in _of_partition(partition, "%l")), default=math.inf)


def _of_partition(partition: str, columns: str, *options: str) -> list[list[str]]:
    """The rows of sinfo with these columns."""
    lines = _run("sinfo", "--all", "--noheader", *options, "--format", f"%P|{columns}").split()
    rows = [line.split("|") for line in lines if "|" in line]
    asked = partition.split(",")
    return [row for name, *row in rows if (name.rstrip("*") in asked if partition else name.endswith("*"))]


def is_usable(state: str) -> bool:
    """Whether a node in this state (sinfo's %T) runs jobs, now or after its present ones. ``*``: it does not answer."""
    return not state.endswith("*") and not state.startswith(_UNUSABLE)


def _run(
    *command: str, text: str | None = None, extra: Mapping[str, str] | None = None, seconds: float = _TIMEOUT
) -> str:
    environment = {k: v for k, v in os.environ.items() if k in _KEPT or not k.startswith(_DROPPED)}
    try:
        done = subprocess.run(
            command, input=text, env=environment | dict(extra or {}), capture_output=True, text=True, timeout=seconds
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on this machine: use a login node of the cluster.") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} has not answered for {seconds:.0f} s: try again when Slurm is back.") from None
    if done.returncode:
        message = " ".join(done.stderr.replace(f"{command[0]}: error: ", "").split()) or f"exit code {done.returncode}"
        raise SlurmError(f"{command[0]} fails: {message}")
    return done.stdout
