"""What a job of a chain does before and after training. Run by the batch script, on the first node of the job.

    python -m launchers.chain before HOME        prints "train" or "drain"
    python -m launchers.chain after HOME CODE    exits with what became of it; CODE is srun's, or the signal (USR1,
                                                 TERM) that came before srun was started

It trains nothing and claims nothing. The successor is queued before training, so that it is there when this node dies;
singleton dependency keeps it waiting until this job is gone. Afterwards it is kept or cancelled, as the records say.
"""

import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_sharding.errors import UserError
from data_sharding.storage.local_store import LocalStore
from fitv2_scale.run.log import newest_attempt, now
from fitv2_scale.run.run import RETRY, Run
from launchers import slurm
from launchers.chain_log import ChainLog, Verdict, excluded, outcome_of, signal_seconds, verdict
from launchers.hostlist import expand
from launchers.notify import HUNG, publish, tell, was_hung

CHAIN_FILE = "chain.json"


@dataclass(frozen=True)
class Chain:
    """What a submission wants; chain.json in its home."""

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
    signal_seconds: int = 0  # as asked; 0: learned

    @classmethod
    def load(cls, home: str | Path) -> "Chain":
        record = LocalStore(str(home)).read_json(CHAIN_FILE)
        if record is None:
            raise UserError(f"{home} has no {CHAIN_FILE}: restore the folder, or submit the run again.")
        return cls(**record)

    def save(self) -> None:
        LocalStore(self.home).put_json(CHAIN_FILE, asdict(self), indent=1)

    def judge(self, run: Run, history: ChainLog) -> Verdict:
        return verdict(history.since_submit, run.log.entries(), self.steps, self.fruitless)


@dataclass(frozen=True)
class This:
    """The job that this runs in."""

    job: str
    restart: int
    nodes: list[str]

    @classmethod
    def of(cls, environment: Any) -> "This":
        restart = int(environment.get("SLURM_RESTART_COUNT", 0))
        return cls(environment["SLURM_JOB_ID"], restart, expand(environment["SLURM_JOB_NODELIST"]))


def before(home: str) -> str:
    """ "train", with a START on record and a successor in the queue; or "drain"."""
    chain = Chain.load(home)
    run, this = Run.open(chain.run), This.of(os.environ)
    history = ChainLog(run.store)
    outcome = chain.judge(run, history)
    if outcome.event:
        _say(f"{outcome.reason}: nothing to do")
        _cancel_pending(chain, this)
        if history.records[-1]["kind"] == "START":  # the last job was killed, and could not
            _announce(chain, outcome.event, outcome.reason)
        return "drain"
    log = run.log.entries()
    commits = sum(entry.kind == "COMMIT" for entry in log)
    history.add(
        "START",
        job=this.job,
        restart=this.restart,
        nodes=this.nodes,
        commits=commits,
        attempt=newest_attempt(log),
        signal=(told := signal_seconds(run, chain.signal_seconds)),
    )
    _keep_successor(chain, history, this, told)
    return "train"


def after(home: str, ended: str) -> int:
    """Records how the job ended, and keeps the successor or cancels it. Returns the job's exit code."""
    chain = Chain.load(home)
    run, this = Run.open(chain.run), This.of(os.environ)
    history = ChainLog(run.store)
    start = history.newest_start
    if start is None or (start["job"], start["restart"]) != (this.job, this.restart):
        _say("a newer job has taken over")  # this node was believed dead
        return RETRY
    if ended.isdigit():
        code, reason, clean = outcome_of(run, start["attempt"], int(ended))
    else:
        code, reason, clean = RETRY, f"SIG{ended} came before its ranks were started", True
    srun_log = Path(home) / f"srun-{this.job}.log"
    blamed = hung_nodes(run, start["attempt"]) or ([] if clean else culprits(srun_log.read_text(), this.nodes))
    history.add("END", job=this.job, restart=this.restart, code=code, reason=reason, blamed=blamed)
    _say(f"ended with {code}: {reason}" + (f"; {', '.join(blamed)} will be avoided" if blamed else ""))
    outcome = chain.judge(run, history)
    if outcome.event is None:
        told = signal_seconds(run, chain.signal_seconds)
        _keep_successor(chain, history, this, told, anew=told > start.get("signal", told))
        if was_hung(run, start["attempt"]):
            _announce(chain, HUNG, reason)
        return code
    _cancel_pending(chain, this)
    _say(f"the chain ends: {outcome.reason}")
    _announce(chain, outcome.event, outcome.reason)
    return outcome.code


def hung_nodes(run: Run, before: int) -> list[str]:
    """Nodes of the ranks that the watchdog of the newest attempt found hanging."""
    newest = newest_attempt(run.log.entries())
    found = run.store.read_json(f"attempts/{newest}/hung.json") if newest > before else None
    return sorted({rank["node"] for rank in found or ()})


_FAILED = re.compile(r"^srun: error: (?:Node failure on )?([^:\s]+)(?:: tasks? [\d,-]+: (.*))?$", re.MULTILINE)


def culprits(srun_said: str, nodes: Sequence[str]) -> list[str]:
    """The node of the first task that failed, if that is one node of several; the others fail because of it."""
    for failure in _FAILED.finditer(srun_said):
        if failure[1] in nodes and len(nodes) > 1:
            return [failure[1]]
        if failure[2]:  # several nodes at once: not a node's fault
            return []
    return []


def _keep_successor(chain: Chain, history: ChainLog, this: This, told: int, anew: bool = False) -> None:
    """Sees to it that one job is pending, as the newest submission wants it, away from nodes that failed, and that it
    is told to save ``told`` seconds before its time limit. Slurm can't change that of a pending job: if it must, that
    one is queued ``anew``. A job that somebody has cancelled queues none: they may have cancelled its successor too.

    What Slurm refuses is said and not fatal: this job was submitted with --requeue.
    """
    history.refresh()  # a person may have submitted again meanwhile
    assert history.submit is not None
    newest = Chain.load(history.submit["home"])
    if not slurm.available():
        return  # `submit` has queued successors
    try:
        usable = slurm.usable_nodes(newest.partition)
        avoid = excluded(history.records, usable, newest.least, newest.exclude_minutes, now())
        nodes = node_count(len(set(usable) - set(avoid)), newest.least, newest.most)
        jobs = slurm.queue(newest.name)
        cancelled = any(job.id == this.job and job.state == "COMPLETING" for job in jobs)
        pending = [job for job in jobs if job.state == "PENDING" and job.id != this.job]
        script = f"{newest.home}/job.sh"
        kept = [] if anew and not cancelled else [job for job in pending if job.script == script][:1]
        slurm.cancel([job.id for job in pending if job not in kept])
        if kept:
            slurm.set_pending(kept[0].id, nodes, nodes * newest.tasks_per_node, avoid)
        elif not cancelled:
            options = [f"--nodes={nodes}", *_signal_option(script, told)]
            options += [f"--exclude={','.join(avoid)}"] if avoid else []
            successor = slurm.sbatch(script, *options)
            _say(f"job {successor} is queued to go on, with {nodes} nodes")
        if not cancelled:
            slurm.do_not_requeue(this.job)  # else both would come back when a node dies
    except slurm.SlurmError as error:
        _say(f"no successor: {error}")


def _signal_option(script: str, told: int) -> list[str]:
    """What is signalled in which way, the script says; when, is known better now."""
    found = re.search(r"^#SBATCH --signal=(\S+)@\d+$", Path(script).read_text(), re.MULTILINE)
    return [f"--signal={found[1]}@{told}"] if found else []


def node_count(usable: int, least: int, most: int) -> int:
    return max(least, min(most, usable))


def _cancel_pending(chain: Chain, this: This) -> None:
    if slurm.available():
        try:
            slurm.cancel([job.id for job in slurm.queue(chain.name) if job.state == "PENDING" and job.id != this.job])
        except slurm.SlurmError as error:
            _say(f"what is pending will drain by itself: {error}")


def _announce(chain: Chain, event: str, reason: str) -> None:
    """Publishes what the uploader had no time for, and runs slurm.on_event."""
    problems = [publish(chain.run) if chain.tracked else None, tell(chain.on_event, event, chain.run, reason)]
    for problem in filter(None, problems):
        _say(problem)


def _say(text: str) -> None:
    print(f"{now()[:19]} job {os.environ.get('SLURM_JOB_ID')}: {text}", file=sys.stderr, flush=True)


def main() -> int:
    try:
        if sys.argv[1] == "before":
            print(before(sys.argv[2]))
            return 0
        return after(sys.argv[2], sys.argv[3])
    except UserError as error:
        _say(str(error))
    except Exception:
        traceback.print_exc()
    return RETRY


if __name__ == "__main__":
    sys.exit(main())
