"""Stop, save, logs and status of a run that trains elsewhere. Requests go through the run's storage, which all sides
reach; Slurm is used where it is installed."""

import logging
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_sharding.errors import UserError
from fitv2_scale.run.log import newest_attempt, now
from fitv2_scale.run.requests import save_request_path
from fitv2_scale.run.run import Attempt, Run
from launchers import slurm
from launchers.chain import CHAIN_FILE, Chain
from launchers.chain_log import ChainLog

_QUICK = 10.0  # seconds that a report waits for Slurm

log = logging.getLogger(__name__)


def stop(url: str, at_once: bool) -> list[str]:
    """Ends the run's attempt and its chain, saving unless ``at_once``. Returns what was done, in sentences.

    The STOP in the log suffices, for the attempt and its launcher read it. Slurm only makes it faster.
    """
    run = Run.open(url)
    run.log.stop(at_once)
    done = [
        f"{run.url}: STOP is in its log; the running attempt {'ends without saving' if at_once else 'saves and ends'}"
    ]
    try:
        jobs = slurm.queue(job_name(run.id)) if slurm.available() else []
        pending = [job.id for job in jobs if job.state == "PENDING"]
        slurm.cancel(pending)
        done += [f"job {job} was pending and is cancelled" for job in pending]
        if at_once:  # the attempt sees the STOP by itself, but not if it hangs
            running = [job.id for job in jobs if job.state == "RUNNING"]
            # Ranks do not note it, and it ends them. Before a KILL, Slurm sends TERM, on which they save.
            slurm.cancel(running, signal="ALRM")
            done += [f"the processes of job {job} are killed" for job in running]
    except slurm.SlurmError as error:
        done.append(f"jobs could not be cancelled: {error}")
    return done


def save(url: str) -> str:
    """Asks the running attempt for a commit at its next step. Raises UserError if there is none."""
    run = Run.open(url)
    newest = newest_attempt(run.log.entries())
    if newest == 0 or Attempt(newest, run).read_end() is not None:
        raise UserError(f"{run.url}: no attempt is running, so there is nothing to save.")
    run.store.put_json(save_request_path(newest), {"time": now(), "nonce": secrets.token_hex(8)})
    return f"{run.url}: attempt {newest} commits at its next step"


def log_file(url: str, rank: int) -> Path:
    """The file with the output of that rank: of the newest chain of jobs, else of the newest attempt.

    Raises UserError if there is none.
    """
    run = Run.open(url)
    newest, submit = newest_attempt(run.log.entries()), ChainLog(run.store).submit
    files = [run.local_path(f"attempts/{newest}/logs/rank-{rank:05d}.log")]
    if submit:
        files.insert(0, Path(submit["home"]) / f"rank-{rank}.log")
    for file in files:
        if file.is_file():
            return file
    raise UserError(f"there is no log of rank {rank} (looked for {', '.join(map(str, files))}).")


def jobs(run: Run) -> list[dict[str, Any]]:
    """The run's jobs, oldest first: [{"job": "17", "restart": 0, "nodes": ["n1"], "started": …, "ended": … or null,
    "code": 75 or null, "reason": "…" or null, "blamed": []}]."""
    records = ChainLog(run.store).records
    ends = {(r["job"], r["restart"]): r for r in records if r["kind"] == "END"}
    report = []
    for start in (r for r in records if r["kind"] == "START"):
        end = ends.get((start["job"], start["restart"]), {})
        head = {key: start[key] for key in ("job", "restart", "nodes")} | {"started": start["time"]}
        fields = {key: end.get(key) for key in ("code", "reason")}
        report.append(head | {"ended": end.get("time"), **fields, "blamed": end.get("blamed", [])})
    return report


def waiting(run: Run) -> list[dict[str, str]]:
    """The run's pending jobs and why they wait, in Slurm's words: [{"job": "27", "reason": "PartitionTimeLimit"}]."""
    if ChainLog(run.store).submit is None or not slurm.available():
        return []
    try:
        queued = slurm.queue(job_name(run.id), seconds=_QUICK)
    except slurm.SlurmError as error:
        log.warning("the queue is not known: %s", error)
        return []
    return [{"job": job.id, "reason": job.reason} for job in queued if job.state == "PENDING"]


def chain(run: Run) -> dict[str, Any] | None:
    """The state of the run's newest chain of jobs: {"event": "no-progress", "code": 93, "reason": …}; ``event`` is null
    while it continues. None if the run never had a chain."""
    chain_log = ChainLog(run.store)
    if chain_log.submit is None or not Path(chain_log.submit["home"], CHAIN_FILE).exists():
        return None
    return asdict(Chain.load(chain_log.submit["home"]).verdict(run, chain_log))


def job_name(run_id: str) -> str:
    """The name of a run's jobs; unique to the run."""
    return f"fitv2-{run_id}"
