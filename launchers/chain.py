"""What a job of a chain does before and after training. The batch script calls this on the first node of the job.

    python -m launchers.chain before HOME        prints "train", or "drain" if the job has nothing to do
    python -m launchers.chain after HOME CODE    exits with the outcome; CODE is srun's exit code, or the signal (USR1,
                                                 TERM) that came before srun was started

It neither trains nor claims an attempt. The successor is queued before training, so that it is there if this node dies;
its singleton dependency makes it wait until this job has ended. Afterwards it is kept or cancelled, by the verdict.
"""

import os
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from data_sharding.errors import DataError, UserError
from data_sharding.standard_streams import reporting
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.records import ListOf, Shape
from fitv2_scale.run.log import newest_attempt, now
from fitv2_scale.run.run import RETRY, Run
from launchers import slurm
from launchers.chain_log import (
    NO_SUCCESSOR,
    ChainLog,
    Outcome,
    Verdict,
    nodes_to_exclude,
    outcome_of,
    signal_seconds,
    verdict,
)
from launchers.hostlist import expand
from launchers.notify import HUNG, run_event_command, sync_mlflow, was_hung
from launchers.sbatch_options import excluded_nodes, script_options
from launchers.srun_output import first_failed_node, killed_task, refusing_log

CHAIN_FILE = "chain.json"


@dataclass(frozen=True)
class Chain:
    """The settings of a submission, which all of its jobs read; chain.json in its home."""

    run: str  # URL
    name: str  # of its jobs
    home: str
    steps: int
    least: int  # nodes
    most: int
    tasks_per_node: int
    partition: str
    fruitless: int
    exclude_minutes: float
    on_event: str
    tracked: bool
    signal_seconds: int = 0  # as configured; 0: from measured times

    @classmethod
    def load(cls, home: str | Path) -> "Chain":
        record = LocalStore(str(home)).read_json(CHAIN_FILE)
        if record is None:
            raise UserError(f"{home} has no {CHAIN_FILE}: restore the folder, or submit the run again.")
        try:
            return TypeAdapter(cls).validate_python(record)
        except ValidationError as error:
            cause = error.errors()[0]["msg"]
            raise DataError(f"{home}/{CHAIN_FILE} is damaged ({cause}): submit the run again.") from error

    def save(self) -> None:
        LocalStore(self.home).put_json(CHAIN_FILE, asdict(self), indent=1)

    def verdict(self, run: Run, chain_log: ChainLog) -> Verdict:
        return verdict(chain_log.since_submit, run.log.entries(), self.steps, self.fruitless)


@dataclass(frozen=True)
class ThisJob:
    """The job that this process runs in."""

    id: str
    restart: int  # how often Slurm has requeued it
    nodes: list[str]

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "ThisJob":
        restart = int(environment.get("SLURM_RESTART_COUNT", 0))
        return cls(environment["SLURM_JOB_ID"], restart, expand(environment["SLURM_JOB_NODELIST"]))


def before(home: str) -> str:
    """Returns "train", with a START in the chain's log and a successor in the queue, or "drain"."""
    chain = Chain.load(home)
    run, job = Run.open(chain.run), ThisJob.of(os.environ)
    chain_log = ChainLog(run.store)
    decision = chain.verdict(run, chain_log)
    if decision.event not in (None, NO_SUCCESSOR):  # somebody has requeued a job that was the last
        _print(f"{decision.reason}: nothing to do")
        _cancel_pending(chain, job)
        if chain_log.records[-1]["kind"] == "START":  # the last job was killed, before it could notify
            _notify(chain, decision.event, decision.reason)
        return "drain"
    log = run.log.entries()
    commits, seconds = sum(entry.kind == "COMMIT" for entry in log), signal_seconds(run, chain.signal_seconds)
    chain_log.add(
        "START",
        job=job.id,
        restart=job.restart,
        nodes=job.nodes,
        commits=commits,
        attempt=newest_attempt(log),
        signal=seconds,
    )
    _ensure_successor(chain_log, job, seconds)
    return "train"


def after(home: str, ended: str) -> int:
    """Records how the job ended, and keeps the successor or cancels it. Returns the job's exit code."""
    chain = Chain.load(home)
    run, job = Run.open(chain.run), ThisJob.of(os.environ)
    chain_log = ChainLog(run.store)
    start = chain_log.newest_start
    if start is None or (start["job"], start["restart"]) != (job.id, job.restart):
        _print("a newer job has taken over")  # Slurm believed this node dead
        return RETRY
    srun_output = _read(Path(home) / f"srun-{job.id}.log")
    if ended.isdigit():
        outcome = outcome_of(run, start["attempt"], int(ended), refusing_log(srun_output, home))
    else:
        outcome = Outcome(RETRY, f"SIG{ended} came before its ranks were started", True)
    blamed = hung_nodes(run, start["attempt"])
    if not blamed and not outcome.clean:
        blamed = first_failed_node(srun_output, job.nodes)
    code, reason = outcome.code, outcome.reason
    if not outcome.clean and (killed := killed_task(srun_output)):
        reason = f"{killed}; {reason}"
    chain_log.add("END", job=job.id, restart=job.restart, code=code, reason=reason, blamed=blamed)
    _print(f"ended with {code}: {reason}" + (f"; {', '.join(blamed)} will be avoided" if blamed else ""))
    decision = chain.verdict(run, chain_log)
    if decision.event is None:
        seconds = signal_seconds(run, chain.signal_seconds)
        missing = _ensure_successor(chain_log, job, seconds, replace=seconds > start.get("signal", seconds))
        if was_hung(run, start["attempt"]):
            _notify(chain, HUNG, reason)
        if missing and not _requeue(job):  # last, since it ends this process
            chain_log.add("ALONE", job=job.id, restart=job.restart, reason=missing)
            _notify(chain, NO_SUCCESSOR, missing)
        return code
    _cancel_pending(chain, job)
    _print(f"the chain ends: {decision.reason}")
    _notify(chain, decision.event, decision.reason)
    return decision.code


class _Hung(Shape):
    node: str


def hung_nodes(run: Run, before: int) -> list[str]:
    """The nodes of ranks that the watchdog reported as hung in the newest attempt, if that is newer than ``before``."""
    newest = newest_attempt(run.log.entries())
    try:
        found = run.store.read_json(f"attempts/{newest}/hung.json", ListOf[_Hung]) if newest > before else None
    except DataError as error:
        _print(f"nobody is blamed: {error}")
        return []
    return sorted({rank["node"] for rank in found or ()})


def _read(file: Path) -> str:
    """Empty if there is no such file: srun was not started."""
    return file.read_text(errors="replace") if file.exists() else ""


def _ensure_successor(chain_log: ChainLog, job: ThisJob, seconds: int, replace: bool = False) -> str:
    """Makes sure that exactly one job is pending, with the settings of the newest submission and without nodes that
    failed or that the user excludes, which gets its signal to save ``seconds`` before its time limit.

    Slurm cannot change that of a pending job, so ``replace`` cancels the pending one and queues another. A job that was
    cancelled queues none: whoever did that may have cancelled its successor too.

    An error of Slurm is printed and not fatal, since this job was submitted with --requeue. Returns why none could be
    queued; "" if one is, if that is not known, or if there should be none.
    """
    chain_log.refresh()  # a person may have submitted again meanwhile
    assert chain_log.submit is not None
    newest = Chain.load(chain_log.submit["home"])
    if not slurm.available():
        return ""  # `fitv2 submit` has queued slurm.successors
    queueing = False
    try:
        script = f"{newest.home}/job.sh"
        text = Path(script).read_text()
        by_user = excluded_nodes(script_options(text))
        usable = sorted(set(slurm.usable_nodes(newest.partition)) - set(by_user))
        failed = nodes_to_exclude(chain_log.records, usable, newest.least, newest.exclude_minutes, now())
        excluded = sorted({*failed, *by_user})  # what is given to sbatch replaces what the script says
        exclude = [f"--exclude={','.join(excluded)}"] if excluded else []
        nodes = node_count(len(set(usable) - set(failed)), newest.least, newest.most)
        nodes = slurm.most_nodes(text, newest.least, nodes, *exclude)
        jobs = slurm.queue(newest.name)
        cancelled = any(other.id == job.id and other.state == "COMPLETING" for other in jobs)
        pending = [other for other in jobs if other.state == "PENDING" and other.id != job.id]
        kept = [] if replace and not cancelled else [other for other in pending if other.script == script][:1]
        slurm.cancel([other.id for other in pending if other not in kept])
        if kept:
            slurm.set_pending(kept[0].id, nodes, nodes * newest.tasks_per_node, excluded)
        elif not cancelled:
            queueing = True
            successor = slurm.sbatch(script, f"--nodes={nodes}", *_signal_option(text, seconds), *exclude)
            queueing = False
            _print(f"job {successor} is queued as the successor, on {nodes} nodes")
        if not cancelled:
            slurm.do_not_requeue(job.id)  # else both would come back when a node dies
    except UserError as error:  # of Slurm, or of a list of excluded nodes that cannot be read
        _print(f"no successor: {error}")
        return str(error) if queueing else ""
    return ""


def _requeue(job: ThisJob) -> bool:
    """Makes this job its own successor, where a user may have only one job at a time."""
    try:
        slurm.requeue(job.id)
    except slurm.SlurmError as error:
        _print(f"the chain ends: {error}")
        return False
    _print("it is requeued, since no successor could be queued")
    return True


def _signal_option(script: str, seconds: int) -> list[str]:
    """The script's own --signal option with a newer number of seconds; nothing if it has none."""
    found = re.search(r"^#SBATCH --signal=(\S+)@\d+$", script, re.MULTILINE)
    return [f"--signal={found[1]}@{seconds}"] if found else []


def node_count(usable: int, least: int, most: int) -> int:
    return max(least, min(most, usable))


def _cancel_pending(chain: Chain, job: ThisJob) -> None:
    if slurm.available():
        try:
            jobs = slurm.queue(chain.name)
            slurm.cancel([other.id for other in jobs if other.state == "PENDING" and other.id != job.id])
        except slurm.SlurmError as error:
            _print(f"the pending job could not be cancelled, it will end by itself: {error}")


def _notify(chain: Chain, event: str, reason: str) -> None:
    """Uploads what MLflow does not have yet, and runs slurm.on_event."""
    problems = [
        sync_mlflow(chain.run) if chain.tracked else None,
        run_event_command(chain.on_event, event, chain.run, reason),
    ]
    for problem in filter(None, problems):
        _print(problem)


def _print(text: str) -> None:
    print(f"{now()[:19]} job {os.environ.get('SLURM_JOB_ID')}: {text}", file=sys.stderr, flush=True)


def main() -> int:
    with reporting():  # a full disk below the job's output must not end the chain
        try:
            if sys.argv[1] == "before":
                print(before(sys.argv[2]), flush=True)
                return 0
            return after(sys.argv[2], sys.argv[3])
        except UserError as error:
            _print(str(error))
        except Exception:
            traceback.print_exc()
        return RETRY


if __name__ == "__main__":
    sys.exit(main())
