"""What a person does to a run while it trains somewhere else: stop it, save it, look at it. The run itself is what all
sides see; Slurm is only asked where it can be reached."""

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


def stop(url: str, at_once: bool) -> list[str]:
    """Ends the run's attempt and its chain, saving unless ``at_once``. Returns what was done, in sentences.

    The STOP in the log is enough: the attempt and its launcher read it. What Slurm is told here only makes it sooner.
    """
    run = Run.open(url)
    run.log.stop(at_once)
    said = [f"{run.url}: STOP is in its log; the attempt that runs {'does not save' if at_once else 'saves'} and ends"]
    try:
        jobs = slurm.queue(job_name(run.id)) if slurm.available() else []
        pending = [job.id for job in jobs if job.state == "PENDING"]
        slurm.cancel(pending)
        said += [f"job {job} was pending and is cancelled" for job in pending]
        if at_once:  # the attempt sees it by itself, but not if it hangs
            running = [job.id for job in jobs if job.state == "RUNNING"]
            slurm.cancel(running, signal="USR2")  # kills at once; before a KILL, Slurm sends TERM, on which ranks save
            said += [f"the processes of job {job} are killed" for job in running]
    except slurm.SlurmError as error:
        said.append(f"Slurm could not be told: {error}")
    return said


def save(url: str) -> str:
    """Asks the attempt that runs for a commit at its next step."""
    run = Run.open(url)
    newest = newest_attempt(run.log.entries())
    if newest == 0 or Attempt(newest, run).read_end() is not None:
        raise UserError(f"{run.url}: no attempt is running, so there is nothing to save.")
    request = {"time": now(), "nonce": secrets.token_hex(8)}
    run.store.put_json(save_request_path(newest), request)
    return f"{run.url}: attempt {newest} commits at its next step"


def log_file(url: str, rank: int) -> Path:
    """What that rank printed: in the newest chain of jobs, else in the newest attempt. Raises UserError."""
    run = Run.open(url)
    newest, submit = newest_attempt(run.log.entries()), ChainLog(run.store).submit
    files = [run.local_path(f"attempts/{newest}/logs/rank-{rank:05d}.log")]
    if submit:
        files.insert(0, Path(submit["home"]) / f"rank-{rank}.log")
    for file in files:
        if file.is_file():
            return file
    raise UserError(f"there is no log of rank {rank}: neither {' nor '.join(map(str, files))} exists.")


def jobs(run: Run) -> list[dict[str, Any]]:
    """The run's jobs, oldest first: [{"job": "17", "restart": 0, "nodes": ["n1"], "started": …, "ended": … or null,
    "code": 75 or null, "reason": "…" or null, "blamed": []}]."""
    records = ChainLog(run.store).records
    ends = {(r["job"], r["restart"]): r for r in records if r["kind"] == "END"}
    report = []
    for start in (r for r in records if r["kind"] == "START"):
        end = ends.get((start["job"], start["restart"]), {})
        kept = {key: start[key] for key in ("job", "restart", "nodes")} | {"started": start["time"]}
        fields = {key: end.get(key) for key in ("code", "reason")}
        report.append(kept | {"ended": end.get("time"), **fields, "blamed": end.get("blamed", [])})
    return report


def chain(run: Run) -> dict[str, Any] | None:
    """What became of the run's newest chain of jobs: {"event": "no-progress", "code": 93, "reason": …}; ``event`` is
    null while it goes on. None if it never had one."""
    history = ChainLog(run.store)
    if history.submit is None or not Path(history.submit["home"], CHAIN_FILE).exists():
        return None
    return asdict(Chain.load(history.submit["home"]).judge(run, history))


def job_name(run_id: str) -> str:
    """Of a run's jobs; unique to it."""
    return f"fitv2-{run_id}"
