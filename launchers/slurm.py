"""Slurm's programs as functions. Each raises SlurmError with what the program said."""

import math
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_sharding.errors import UserError

_TIMEOUT = 120  # seconds; a busy slurmctld answers late
_UNUSABLE = ("down", "drain", "fail", "maint", "unknown", "inval")


class SlurmError(UserError):
    """A program of Slurm failed or is not there."""


@dataclass(frozen=True)
class Job:
    id: str
    state: str  # as squeue's %T: PENDING, RUNNING, COMPLETING, …
    script: str  # its path


def available() -> bool:
    """Whether this machine can talk to Slurm."""
    return shutil.which("sbatch") is not None


def sbatch(script: str, *options: str, environment: Mapping[str, str] | None = None) -> str:
    """Queues the script in the file ``script``, with ``environment`` besides our own; returns the job's id."""
    return _run("sbatch", "--parsable", *options, script, extra=environment).split(";")[0].strip()


def check(script: str, *options: str) -> None:
    """Asks Slurm whether it would take the script with this text; nothing is queued."""
    _run("sbatch", "--test-only", *options, text=script)


def queue(name: str) -> list[Job]:
    """This user's jobs of that name, oldest first."""
    listed = _run("squeue", "--noheader", "--user", str(os.getuid()), "--name", name, "--format", "%i|%T|%o")
    jobs = [Job(*line.strip().split("|", 2)) for line in listed.splitlines()]
    return sorted(jobs, key=lambda job: int(job.id))


def cancel(jobs: Sequence[str], signal: str | None = None) -> None:
    """Ends jobs; with ``signal``, sends that to the processes of their steps instead."""
    if jobs:
        _run("scancel", *(["--signal", signal] if signal else []), *jobs)


def set_pending(job: str, nodes: int, tasks: int, excluded: Sequence[str]) -> None:
    """Gives a pending job another size and other nodes to avoid, without losing its place in the queue."""
    _run("scontrol", "update", f"JobId={job}", f"NumTasks={tasks}", f"NumNodes={nodes}-{nodes}")
    _run("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(excluded)}")


def do_not_requeue(job: str) -> None:
    _run("scontrol", "update", f"JobId={job}", "Requeue=0")


def partitions() -> list[str]:
    return sorted(set(_run("sinfo", "--noheader", "--format", "%R").split()))


def usable_nodes(partition: str) -> list[str]:
    """Names of the nodes (of the default partition if ``partition`` is empty) that are up, busy or not."""
    lines = _run("sinfo", "--noheader", "--Node", "--format", "%N|%T|%P").split()
    rows = [line.split("|") for line in lines]
    mine = [r for r in rows if (r[2].rstrip("*") == partition if partition else r[2].endswith("*"))]
    return sorted({name for name, state, _ in mine if is_usable(state)})


def is_usable(state: str) -> bool:
    """Whether a node in this state (sinfo's %T) runs jobs, now or when others have ended. ``*``: it does not answer."""
    return not state.endswith("*") and not state.startswith(_UNUSABLE)


def limit_seconds(limit: str) -> float:
    """Of a time limit as sbatch takes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; endless if it is none
    of these, since sbatch may know better."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit):
        return math.inf
    days, dash, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)  # hours
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((24 * int(days or 0) + hours) * 60 + minutes) * 60 + seconds


def _run(*command: str, text: str | None = None, extra: Mapping[str, str] | None = None) -> str:
    # Inside a job, its own variables would count as options of the next one.
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
        said = " ".join(done.stderr.replace(f"{command[0]}: error: ", "").split()) or f"exit code {done.returncode}"
        raise SlurmError(f"{command[0]} refuses: {said}")
    return done.stdout
