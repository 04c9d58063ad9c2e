"""The log of a RUN: one sequence of numbered entries that decides who trains and what is committed.

An entry is one object ``log/<8-digit number>``, written once by conditional create and never changed:

    {"n":1,"kind":"CLAIM","attempt":1,"nonce":"9f0c…","time":"2025-06-01T12:00:00.000000+00:00"}
    {"n":2,"kind":"COMMIT","attempt":1,"nonce":"41d7…","time":"…","step":100,"path":"steps/100","manifest":"sha256:…"}
    {"n":3,"kind":"CLAIM","attempt":2,"nonce":"c011…","time":"…"}
    {"n":4,"kind":"RETIRE","attempt":2,"nonce":"77ab…","time":"…","entry":2}
    {"n":5,"kind":"STOP","attempt":2,"nonce":"e2d9…","time":"…"}

* CLAIM starts an attempt; its number is one more than any claimed before, so numbers are unique.
* COMMIT makes a checkpoint count. Its data and manifest are durable before the entry is written.
* RETIRE withdraws the COMMIT numbered ``entry``. Only then may the data be deleted.
* STOP, written by `fitv2 stop`, ends the running attempt and its chain of jobs. It is in force until the next CLAIM, so
  `train` started by hand revokes it. A chain compares the STOP's number with the log's length at its submission.

Why an old attempt cannot commit: an append takes the first free number, after it has read every entry before. If one of
those is a newer CLAIM, it raises StaleAttempt; if one is written in between, the number is taken and it reads again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from data_sharding.storage.numbered_log import NumberedLog
from data_sharding.storage.records import Count, Shape, Time
from data_sharding.storage.store import Store


class _Entry(Shape):
    n: Count
    kind: str
    attempt: Count
    nonce: str
    time: Time


class _Commit(_Entry):
    step: Count
    path: str
    manifest: str


class _Retire(_Entry):
    entry: Count


_SHAPES: dict[str, type[_Entry]] = {"CLAIM": _Entry, "COMMIT": _Commit, "RETIRE": _Retire, "STOP": _Entry}


class StaleAttempt(Exception):
    """A newer attempt has claimed the run: this one must stop and write nothing more."""


@dataclass(frozen=True)
class LogEntry:
    """One entry. ``attempt`` wrote it; for a STOP, it is the newest attempt at that time (0: none yet)."""

    n: int
    kind: str
    attempt: int
    nonce: str
    time: str  # ISO 8601, UTC
    fields: dict[str, Any]  # the kind's own


def now() -> str:
    """This moment as ISO 8601 in UTC, always with microseconds, so that times sort as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class RunLog:
    """Reads and extends the log in ``store``. Safe to share between threads."""

    def __init__(self, store: Store) -> None:
        remedy = "restore it from a backup, or begin a new run folder with --fork-from."
        self._log = NumberedLog(store, "log", _parse, noun="log entry", remedy=remedy)

    def entries(self) -> list[LogEntry]:
        """All entries as of now, oldest first. Raises DataError if one is damaged."""
        return self._log.entries()

    def require_whole(self) -> None:
        """Raises DataError if an entry before the last is missing: the run would continue from an older commit. Takes a
        listing, so only at the start of an attempt, and for reports."""
        self._log.require_whole()

    def claim(self) -> LogEntry:
        """Starts an attempt. If another claim takes the number first, this one becomes the newer attempt."""
        return self._append("CLAIM", lambda before: newest_attempt(before) + 1, {})

    def commit(self, attempt: int, step: int, path: str, manifest: str) -> LogEntry:
        """Makes the checkpoint at ``path`` (relative to the run; its manifest has digest ``manifest``) count.

        Raises StaleAttempt, with nothing written, if a newer attempt has claimed the run.
        """
        fields = {"step": step, "path": path, "manifest": manifest}
        return self._append("COMMIT", lambda before: require_newest(attempt, before), fields)

    def retire(self, attempt: int, entry: int) -> LogEntry:
        """Withdraws the COMMIT numbered ``entry``; raises StaleAttempt as ``commit`` does, ValueError if it is none."""
        if not any(e.n == entry and e.kind == "COMMIT" for e in self.entries()):
            raise ValueError(f"log entry {entry} is not a COMMIT")
        return self._append("RETIRE", lambda before: require_newest(attempt, before), {"entry": entry})

    def stop(self, at_once: bool = False) -> LogEntry:
        """Asks the running attempt to save and end, and its chain to end; ``at_once``: without saving. Any process may
        call this."""
        return self._append("STOP", newest_attempt, {"at_once": at_once})

    def commits(self) -> list[LogEntry]:
        """The COMMITs that no RETIRE has withdrawn, oldest first."""
        entries = self.entries()
        retired = {e.fields["entry"] for e in entries if e.kind == "RETIRE"}
        return [e for e in entries if e.kind == "COMMIT" and e.n not in retired]

    def stop_requested(self) -> bool:
        """True if a STOP is in force: there is one after the last CLAIM."""
        last = next((e for e in reversed(self.entries()) if e.kind in ("CLAIM", "STOP")), None)
        return last is not None and last.kind == "STOP"

    def _append(self, kind: str, attempt_of: Callable[[Sequence[LogEntry]], int], fields: dict[str, Any]) -> LogEntry:
        """Creates the next entry. ``attempt_of(all entries before)`` is its attempt, or raises StaleAttempt."""

        def build(before: Sequence[LogEntry], nonce: str) -> dict[str, Any]:
            attempt = attempt_of(before)
            head = {"n": len(before) + 1, "kind": kind, "attempt": attempt, "nonce": nonce, "time": now()}
            return head | fields

        return self._log.append(build)[-1]


def newest_attempt(entries: Sequence[LogEntry]) -> int:
    """The number of the newest claimed attempt, 0 if there is none."""
    return max((e.attempt for e in entries if e.kind == "CLAIM"), default=0)


def require_newest(attempt: int, entries: Sequence[LogEntry]) -> int:
    """Returns ``attempt``. Raises StaleAttempt if a newer attempt has claimed the run."""
    if (newest := newest_attempt(entries)) != attempt:
        raise StaleAttempt(f"attempt {attempt} was superseded by attempt {newest}; it must stop")
    return attempt


def _parse(n: int, record: dict[str, Any]) -> LogEntry:
    _SHAPES[record["kind"]].check(record)
    if record["n"] != n:
        raise ValueError(f"it says n={record['n']}")
    if record["attempt"] > n:  # each CLAIM adds one; who looks at all attempts would look for years
        raise ValueError(f"it says attempt={record['attempt']}, but {n} entries are at most {n} attempts")
    return LogEntry(*(record.pop(key) for key in ("n", "kind", "attempt", "nonce", "time")), fields=record)
