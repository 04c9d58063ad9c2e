"""The log of a run's jobs: RUN/chain/00000001, 00000002, …; each record is written once and never changed.

    {"kind": "SUBMIT", "time": "2025-06-01T12:00:00.000000+00:00", "nonce": "9f0c…", "home": "/runs/x/jobs/1a2b3c4d", …}
    {"kind": "START", "time": "…", "nonce": "…", "job": "17", "restart": 0, "nodes": ["n1", "n2"], "commits": 0, …}
    {"kind": "END", "time": "…", "nonce": "…", "job": "17", "restart": 0, "code": 75, "reason": "…", "blamed": ["n2"]}
    {"kind": "ALONE", "time": "…", "nonce": "…", "job": "17", "restart": 0, "reason": "sbatch fails: …"}

SUBMIT: `fitv2 submit` started or changed a chain. ``home`` is the folder with script, code and config of its jobs,
``log`` the length of the run's log.
START: a job started, when the run had had ``commits`` COMMITs and its newest attempt was ``attempt``. The job that it
queued as its successor gets its signal to save ``signal`` seconds before the time limit.
END: the job ended with ``code``, an exit code of `fitv2 train`; ``blamed`` are the nodes that failed. A job that is
killed has no END.
ALONE: the job ended without a successor, and Slurm would not requeue it either. Only a submission continues the chain.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from data_sharding.storage.numbered_log import NumberedLog
from data_sharding.storage.records import Count, Seconds, Shape, Time
from data_sharding.storage.store import Store
from fitv2_scale.run.log import LogEntry, newest_attempt, now
from fitv2_scale.run.run import BAD_INPUT, DONE, GIVE_UP, NOT_FINITE, RETRY, Attempt, Run

MIN_SIGNAL_SECONDS = 300
NO_SUCCESSOR = "no-successor"
_FINAL = (DONE, BAD_INPUT, GIVE_UP)

Record = dict[str, Any]


class _Record(Shape):
    time: Time


class _Submit(_Record):
    home: str
    log: Count


class _Start(_Record):
    job: str
    restart: Count
    nodes: list[str]
    commits: Count
    attempt: Count
    signal: Seconds = 0  # versions up to a2e80d5 did not always write it


class _End(_Record):
    job: str
    restart: Count
    code: int
    reason: str
    blamed: list[str]


class _Alone(_Record):
    job: str
    restart: Count
    reason: str


_SHAPES: dict[str, type[_Record]] = {"SUBMIT": _Submit, "START": _Start, "END": _End, "ALONE": _Alone}


class ChainLog:
    """Reads and extends the log in ``store``. ``records`` are as of the last ``add`` or ``refresh``."""

    def __init__(self, store: Store) -> None:
        remedy = f"restore it from a backup, or delete {store.path('chain')} and submit again."
        self._log = NumberedLog(store, "chain", _parse, noun="record of the chain of jobs", remedy=remedy)
        self.records = self._log.entries()

    def add(self, kind: str, **fields: Any) -> None:
        """Appends a record, after those that other processes have added."""
        self.records = self._log.append(lambda before, nonce: {"kind": kind, "time": now(), "nonce": nonce, **fields})

    def refresh(self) -> None:
        """Reads the records that other processes have added."""
        self.records = self._log.entries()

    @property
    def submit(self) -> Record | None:
        """The newest SUBMIT."""
        return next((r for r in reversed(self.records) if r["kind"] == "SUBMIT"), None)

    @property
    def since_submit(self) -> list[Record]:
        """The records since the newest SUBMIT, without the END of a job that started before it."""
        at = max((i for i, r in enumerate(self.records) if r["kind"] == "SUBMIT"), default=0)
        after = self.records[at:]
        started = {(r["job"], r["restart"]) for r in after if r["kind"] == "START"}
        return [r for r in after if r["kind"] == "SUBMIT" or (r["job"], r["restart"]) in started]

    @property
    def newest_start(self) -> Record | None:
        return next((r for r in reversed(self.records) if r["kind"] == "START"), None)


class Outcome(NamedTuple):
    """How the processes of a job ended."""

    code: int  # an exit code of `fitv2 train`
    reason: str
    clean: bool  # they ended by themselves, and not because one of them failed or was killed


def outcome_of(run: Run, before: int, code: int, said_in: str) -> Outcome:
    """Of processes that ended with exit code ``code``; ``before`` was the newest attempt when they started, and
    ``said_in`` is where bad input is named that none of them could record."""
    newest = newest_attempt(run.log.entries())
    if newest > before:
        end = Attempt(newest, run).read_end()
        if end is None:
            return Outcome(RETRY, f"attempt {newest} was killed", False)
        return Outcome(end["code"], end["reason"], end["code"] in (*_FINAL, RETRY) and not end.get("lost"))
    if code == BAD_INPUT:
        return Outcome(BAD_INPUT, f"bad input, see {said_in}", True)
    return Outcome(RETRY, f"failed before an attempt started (exit code {code})", False)


@dataclass(frozen=True)
class Verdict:
    """Whether a chain continues: ``event`` is why it ends, None if it continues."""

    event: str | None  # done, stopped, bad-input, not-finite, no-progress, gave-up, no-successor
    code: int
    reason: str


def verdict(since_submit: Sequence[Record], log: Sequence[LogEntry], steps: int, fruitless: int) -> Verdict:
    """On a chain with these records, whose run has this log and trains ``steps`` steps. It ends after ``fruitless``
    jobs in a row without a new commit."""
    submit = next((r for r in since_submit if r["kind"] == "SUBMIT"), None)
    if any(e.kind == "STOP" and e.n > (submit["log"] if submit else 0) for e in log):
        return Verdict("stopped", DONE, "fitv2 stop")
    retired = {e.fields["entry"] for e in log if e.kind == "RETIRE"}
    commits = [e for e in log if e.kind == "COMMIT"]
    done = max((e.fields["step"] for e in commits if e.n not in retired), default=0)
    if done >= steps:
        return Verdict("done", DONE, f"all {steps} steps are done")
    last = since_submit[-1] if since_submit else {}
    if last.get("kind") == "END" and last["code"] in _FINAL:
        given_up = "not-finite" if last["reason"].startswith(NOT_FINITE) else "gave-up"
        event = {DONE: "done", BAD_INPUT: "bad-input", GIVE_UP: given_up}[last["code"]]
        return Verdict(event, last["code"], last["reason"])
    without_commit = sum(r["kind"] == "START" and r["commits"] == len(commits) for r in since_submit)
    if without_commit >= fruitless:
        why = f", the last one: {last['reason']}" if last.get("kind") == "END" else ""
        return Verdict("no-progress", GIVE_UP, f"{without_commit} jobs in a row ended without a new commit{why}")
    if last.get("kind") == "ALONE":
        return Verdict(NO_SUCCESSOR, RETRY, f"{last['reason']}: submit again")
    return Verdict(None, RETRY, last.get("reason", ""))


def signal_seconds(run: Run, configured: int) -> int:
    """Seconds before the time limit at which a job gets its signal to save: ``configured``; if that is 0, twice the
    longest step plus save of the newest attempt that has saved, and at least 300."""
    if configured:
        return configured
    for number in range(newest_attempt(run.log.entries()), 0, -1):
        if pace := Attempt(number, run).read_pace():
            return max(MIN_SIGNAL_SECONDS, math.ceil(2 * (pace["step_seconds"] + pace["save_seconds"])))
    return MIN_SIGNAL_SECONDS


def nodes_to_exclude(
    records: Sequence[Record], usable: Sequence[str], least: int, minutes: float, time: str
) -> list[str]:
    """The nodes blamed in the last ``minutes`` before ``time`` (ISO 8601), the newest first, as long as ``least`` of
    the ``usable`` nodes are left. Sorted."""
    names: list[str] = []
    for record in reversed(records):
        if record["kind"] == "END" and _minutes(record["time"], time) <= minutes:
            names += [node for node in record["blamed"] if node not in names]
    excluded: list[str] = []
    for name in names:
        if len(set(usable) - {*excluded, name}) >= least:
            excluded.append(name)
    return sorted(excluded)


def _minutes(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds() / 60


def _parse(number: int, record: Record) -> Record:
    return _SHAPES[record["kind"]].check(record)
