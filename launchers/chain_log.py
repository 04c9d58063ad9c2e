"""What a chain of jobs remembers, in the run: chain/00000001, 00000002, …, each written once, never changed.

    {"kind": "SUBMIT", "time": "2025-06-01T12:00:00.000000+00:00", "nonce": "9f0c…", "home": "/runs/x/jobs/1a2b3c4d", …}
    {"kind": "START", "time": "…", "nonce": "…", "job": "17", "restart": 0, "nodes": ["n1"], "commits": 0, "attempt": 0}
    {"kind": "END", "time": "…", "nonce": "…", "job": "17", "restart": 0, "code": 75, "reason": "…", "blamed": ["n2"]}

SUBMIT: a person asked for a chain; ``home`` has its script, code and config, ``log`` is the length of the run's log.
START: a job begins, when the run has had ``commits`` COMMITs and ``attempt`` was its newest one; its successor is told
to save ``signal`` seconds before its time limit. END: it has ended,
with ``code`` as ``fitv2 train`` means it, and ``blamed`` are nodes that failed. A killed job leaves no END.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from data_sharding.storage.numbered_log import NumberedLog
from data_sharding.storage.store import Store
from fitv2_scale.run.log import LogEntry, newest_attempt, now
from fitv2_scale.run.run import BAD_INPUT, DONE, GIVE_UP, NOT_FINITE, RETRY, Attempt, Run

LEAST_SIGNAL = 300  # seconds
_REQUIRED = {"SUBMIT": ("log",), "START": ("job", "restart"), "END": ("job", "restart", "code", "reason", "blamed")}
FINAL = (DONE, BAD_INPUT, GIVE_UP)


@dataclass(frozen=True)
class Verdict:
    """What becomes of a chain: ``event`` is why it ends, None if it goes on."""

    event: str | None  # done, stopped, bad-input, not-finite, no-progress, gave-up
    code: int
    reason: str


class ChainLog:
    """The records of ``store``, as they were when this was made, or at the last ``add`` or ``refresh``."""

    def __init__(self, store: Store) -> None:
        remedy = f"restore it from a backup, or delete {store.path('chain')} and submit again."
        self._log = NumberedLog(store, "chain", _parse, noun="record of the chain of jobs", remedy=remedy)
        self.records = self._log.entries()

    def add(self, kind: str, **fields: Any) -> None:
        """Appends a record and reads those that others have added."""
        self.records = self._log.append(lambda before, nonce: {"kind": kind, "time": now(), "nonce": nonce, **fields})

    def refresh(self) -> None:
        """Reads the records that others have added."""
        self.records = self._log.entries()

    @property
    def submit(self) -> dict[str, Any] | None:
        """The newest SUBMIT."""
        return next((r for r in reversed(self.records) if r["kind"] == "SUBMIT"), None)

    @property
    def since_submit(self) -> list[dict[str, Any]]:
        """What happened since the newest SUBMIT, but for a job of before that ended after it."""
        at = max((i for i, r in enumerate(self.records) if r["kind"] == "SUBMIT"), default=0)
        after = self.records[at:]
        begun = {(r["job"], r["restart"]) for r in after if r["kind"] == "START"}
        return [r for r in after if r["kind"] == "SUBMIT" or (r["job"], r["restart"]) in begun]

    @property
    def newest_start(self) -> dict[str, Any] | None:
        return next((r for r in reversed(self.records) if r["kind"] == "START"), None)


def outcome_of(run: Run, before: int, code: int) -> tuple[int, str, bool]:
    """What ran since attempt ``before`` was the newest: its code as `fitv2 train` means it, the reason, and whether it
    ended by itself and not by a failure."""
    newest = newest_attempt(run.log.entries())
    if newest > before:
        end = Attempt(newest, run).read_end()
        if end is None:
            return RETRY, f"attempt {newest} was killed", False
        return end["code"], end["reason"], end["code"] in (*FINAL, RETRY)
    if code == BAD_INPUT:
        return BAD_INPUT, "bad input, which the log of rank 0 tells", True
    return RETRY, f"died before it could begin an attempt (exit code {code})", False


def verdict(since_submit: Sequence[dict[str, Any]], log: Sequence[LogEntry], steps: int, fruitless: int) -> Verdict:
    """What becomes of a chain with this history and this log of the run; ``fruitless`` jobs in a row end it."""
    submit = next((r for r in since_submit if r["kind"] == "SUBMIT"), None)
    if any(e.kind == "STOP" and e.n > (submit["log"] if submit else 0) for e in log):
        return Verdict("stopped", DONE, "fitv2 stop")
    retired = {e.fields["entry"] for e in log if e.kind == "RETIRE"}
    commits = [e for e in log if e.kind == "COMMIT"]
    done = max((e.fields["step"] for e in commits if e.n not in retired), default=0)
    if done >= steps:
        return Verdict("done", DONE, f"all {steps} steps are done")
    last = since_submit[-1] if since_submit else {}
    if last.get("kind") == "END" and last["code"] in FINAL:
        given_up = "not-finite" if last["reason"].startswith(NOT_FINITE) else "gave-up"
        event = {DONE: "done", BAD_INPUT: "bad-input", GIVE_UP: given_up}[last["code"]]
        return Verdict(event, last["code"], last["reason"])
    vain = sum(r["kind"] == "START" and r["commits"] == len(commits) for r in since_submit)
    if vain >= fruitless:
        why = f", the last one: {last['reason']}" if last.get("kind") == "END" else ""
        return Verdict("no-progress", GIVE_UP, f"{vain} jobs in a row ended without a new commit{why}")
    return Verdict(None, RETRY, last.get("reason", ""))


def signal_seconds(run: Run, asked: int) -> int:
    """How long before the time limit a job must be told to save: ``asked``, or if that is 0 what the newest attempt
    that has saved would need twice over, and at least 300."""
    if asked:
        return asked
    for number in range(newest_attempt(run.log.entries()), 0, -1):
        if pace := Attempt(number, run).read_pace():
            return max(LEAST_SIGNAL, math.ceil(2 * (pace["step_seconds"] + pace["save_seconds"])))
    return LEAST_SIGNAL


def excluded(
    records: Sequence[dict[str, Any]], usable: Sequence[str], least: int, minutes: float, time: str
) -> list[str]:
    """Nodes to avoid: those blamed in the last ``minutes`` before ``time`` (ISO 8601), the newest first, as long as
    ``least`` of the ``usable`` ones are left."""
    names: list[str] = []
    for record in reversed(records):
        if record["kind"] == "END" and _minutes(record["time"], time) <= minutes:
            names += [node for node in record["blamed"] if node not in names]
    kept: list[str] = []
    for name in names:
        if len(set(usable) - {*kept, name}) >= least:
            kept.append(name)
    return sorted(kept)


def _minutes(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds() / 60


def _parse(number: int, record: dict[str, Any]) -> dict[str, Any]:
    if (kind := record["kind"]) not in _REQUIRED:
        raise ValueError(f"it says kind={kind!r}")
    if missing := [key for key in _REQUIRED[kind] if key not in record]:
        raise ValueError(f"this {kind} has no {missing[0]}")
    return record
