"""A child run of MLflow for each attempt, with live measurements: not committed yet, thinned out, abandoned steps
included.

A child has at most six curves: those of KEYS that are measured, and lag_steps, the number of steps by which the
canonical curve was behind at that moment. Every tenth of the journal's records with such keys is sent. The progress is
kept in the run folder:

    tracking/live.json    {"mlflow_run": "8d0f…", "attempt": 3, "segment": 7, "offset": 8123, "seen": 410}

for the canonical run ``mlflow_run``. If the process is killed before that is written, it sends the same points again.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime

from data_sharding.storage.records import Count
from fitv2_scale.run.log import LogEntry, newest_attempt, now
from fitv2_scale.run.run import Attempt, Run
from fitv2_scale.tracking import journal, tags
from fitv2_scale.tracking.mlflow_writer import Row, Server, ServerRun

KEYS = ("loss", "grad_norm", "lr", "images_per_second", "mfu")
_EVERY = 10
STATE = "tracking/live.json"


class _State(journal.PositionShape):
    """live.json."""

    mlflow_run: str | None = None
    seen: Count = 0


class LiveRuns:
    """The child runs of the canonical MLflow run ``parent``. Methods raise ServerError."""

    def __init__(self, run: Run, server: Server, parent: str, name: str) -> None:
        """``name`` is that of the canonical run."""
        self._run, self._server, self._parent, self._name = run, server, parent, name
        state = run.store.read_json(STATE, _State, journal.SEND_AGAIN) or {}
        same = state.get("mlflow_run") == parent
        self._seen = state.get("seen", 0) if same else 0  # records of the attempt with any of KEYS
        self._position = journal.Position.of(state) if same else journal.Position(attempt=1)
        self._child: ServerRun | None = None  # of the attempt at ``_position``
        self.step = 0  # the last measured step that was read

    def publish(self, entries: Sequence[LogEntry]) -> None:
        """Sends the new measurements, and closes the children of attempts that are no longer the newest."""
        committed = _Committed(entries)
        while True:
            self._send(committed)
            attempt = self._position.attempt
            if attempt >= newest_attempt(entries):
                return
            self.close()
            self._save(journal.Position(attempt + 1), 0)

    def close(self) -> None:
        """Sets the final status of the child of the newest attempt that was read, if it has one."""
        if self._seen:
            self._open().terminate(*final_status(Attempt(self._position.attempt, self._run)))
        self._child = None

    def _send(self, committed: "_Committed") -> None:
        position, seen = self._position, self._seen
        rows: list[Row] = []
        for record in journal.read_attempt(self._run, position):
            position, self.step = record.end, max(self.step, record.step)
            values = {key: record.metrics[key] for key in KEYS if key in record.metrics} if record.metrics else {}
            if not values:
                continue
            if seen % _EVERY == 0:
                values["lag_steps"] = float(max(0, record.step - committed.at(record.time_ms)))
                rows += [(key, value, record.time_ms, record.step) for key, value in values.items()]
            seen += 1
        if rows:
            self._open().log_metrics(rows)
        if position != self._position:
            self._save(position, seen)

    def _open(self) -> ServerRun:
        if self._child is None:
            number = self._position.attempt
            note = (
                f"Live measurements of attempt {number} of {self._name}: every tenth point, including steps that are "
                "not committed yet. The parent run has the complete curve up to the last commit."
            )
            start = Attempt(number, self._run).read_start()
            self._child = self._server.open_run(
                tags.LIVE_ID,
                f"{self._name}/{number}",
                start_ms=ms(start.get("time", now())),
                name=f"{self._name} live, attempt {number}",
                tags={"mlflow.parentRunId": self._parent, "mlflow.note.content": note}
                | tags.attempt_tags(number, start),
            )
        return self._child

    def _save(self, position: journal.Position, seen: int) -> None:
        self._position, self._seen = position, seen
        self._run.store.put_json(STATE, {"mlflow_run": self._parent} | asdict(position) | {"seen": seen})


class _Committed:
    """The last committed step at any time."""

    def __init__(self, entries: Sequence[LogEntry]) -> None:
        self._times, self._steps = [0], [0]
        for entry in entries:
            if entry.kind == "COMMIT":
                self._times.append(max(self._times[-1], ms(entry.time)))
                self._steps.append(max(self._steps[-1], entry.fields["step"]))

    def at(self, time_ms: int) -> int:
        return self._steps[bisect_right(self._times, time_ms) - 1]


def final_status(attempt: Attempt) -> tuple[str, int]:
    """MLflow's status for the end of an attempt, and its time in ms since 1970.

    KILLED stands for exit code 75 (saved, wants another attempt) and for a missing end.json. The next attempt sets the
    run RUNNING again.
    """
    end = attempt.read_end() or {"code": None, "time": now()}
    return {0: "FINISHED", 75: "KILLED", None: "KILLED"}.get(end["code"], "FAILED"), ms(end["time"])


def ms(iso: str) -> int:
    return int(datetime.fromisoformat(iso).timestamp() * 1000)
