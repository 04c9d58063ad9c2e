"""Slurm's programs as functions. Each raises SlurmError with the program's error message."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_sharding.errors import UserError

_TIMEOUT = 120  # seconds; a busy slurmctld answers late
_UNUSABLE = ("down", "drain", "fail", "maint", "unknown", "inval")


class SlurmError(UserError):
    """A program of Slurm failed, or is not installed."""


@dataclass(frozen=True)
class Job:
    id: str
    state: str  # as squeue's %T: PENDING, RUNNING, COMPLETING, …
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


def queue(name: str) -> list[Job]:
    """This user's jobs of that name, oldest first."""
    listed = _run("squeue", "--noheader", "--user", str(os.getuid()), "--name", name, "--format", "%i|%T|%o")
    jobs = [Job(*line.strip().split("|", 2)) for line in listed.splitlines()]
    return sorted(jobs, key=lambda job: int(job.id))


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


def partitions() -> list[str]:
    return sorted(set(_run("sinfo", "--noheader", "--format", "%R").split()))


def usable_nodes(partition: str) -> list[str]:
    """Names of the nodes that are up, busy or not; of the default partition if ``partition`` is empty."""
    lines = _run("sinfo", "--noheader", "--Node", "--format", "%N|%T|%P").split()
    rows = [line.split("|") for line in lines]
    mine = [r for r in rows if (r[2].rstrip("*") == partition if partition else r[2].endswith("*"))]
    return sorted({name for name, state, _ in mine if is_usable(state)})


def is_usable(state: str) -> bool:
    """Whether a node in this state (sinfo's %T) runs jobs, now or after its present ones. ``*``: it does not answer."""
    return not state.endswith("*") and not state.startswith(_UNUSABLE)


def _run(*command: str, text: str | None = None, extra: Mapping[str, str] | None = None) -> str:
    # The variables of the job that this runs in would count as options of the next one.
    environment = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(("SLURM_", "SBATCH_"))}
    try:
        done = subprocess.run(
            command, input=text, env=environment | dict(extra or {}), capture_output=True, text=True, timeout=_TIMEOUT
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on this machine: use a login node of the cluster.") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} has not answered for {_TIMEOUT} s: try again when Slurm is back.") from None
    if done.returncode:
        message = " ".join(done.stderr.replace(f"{command[0]}: error: ", "").split()) or f"exit code {done.returncode}"
        raise SlurmError(f"{command[0]} fails: {message}")
    return done.stdout
