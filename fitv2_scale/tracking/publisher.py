"""Brings a run's journal to one MLflow and remembers how far it got. Loads mlflow: the uploader's process only.

In the run folder it keeps

    tracking/mlflow.json    {"uri": "sqlite:////runs/mlflow.db", "experiment": "fitv2", "mlflow_run": "8d0f…"}
    tracking/ack.json       {"mlflow_run": "8d0f…", "attempt": 3, "segment": 7, "offset": 8123}

ack.json says what MLflow has, and is written after each batch: a killed publisher sends at most one batch again, with
the same times, which MLflow's SQL stores drop.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from fitv2_scale.redact import redact
from fitv2_scale.run import Attempt, Run, flatten
from fitv2_scale.run_log import newest_attempt, now
from fitv2_scale.tracking import journal
from fitv2_scale.tracking.mlflow_sink import MAX_METRICS_PER_BATCH, MlflowSink, ServerError

__all__ = ["Publisher", "ServerError"]

_IDENTITY, _ACK = "tracking/mlflow.json", "tracking/ack.json"


class Publisher:
    """Publishes one run to the MLflow at ``uri``. For one process at a time: hold the uploader's lock.

    Making one connects, so that this too raises ``mlflow_sink.ServerError``.
    """

    def __init__(self, run: Run, uri: str, experiment: str) -> None:
        self._run = run
        self._attempt = 0  # the newest that MLflow knows of
        self._sink = MlflowSink(
            uri,
            experiment,
            artifact_root(uri),
            run_id=run.id,
            start_ms=_ms(run.created),
            tags=_tags(run),
            params=redact(flatten(run.config)),
        )
        place = {"uri": redact(uri), "experiment": experiment, "mlflow_run": self.mlflow_run}
        if self._get(_IDENTITY) != place:
            self._put(_IDENTITY, place)
        ack = self._get(_ACK) or {}
        same = ack.pop("mlflow_run", None) == self.mlflow_run  # another server, or a new MLflow run, gets everything
        self._ack = journal.Position(**ack) if same else journal.Position()

    @property
    def mlflow_run(self) -> str:
        """MLflow's id of the run."""
        return self._sink.mlflow_run

    def publish(self) -> dict[str, int]:
        """Sends everything committed and not yet acknowledged. Returns {"metrics": 1200, "pictures": 3, "missing": 0}.

        Missing are pictures whose files are gone. Raises ServerError; what was acknowledged by then stays so.
        """
        counts = {"metrics": 0, "pictures": 0, "missing": 0}
        newest = newest_attempt(self._run.log.entries())
        if newest != self._attempt:
            self._sink.tag("fitv2.attempt", str(newest))
            self._attempt = newest
        for batch in _batches(journal.read(self._run, self._ack)):
            rows = [(name, v, r.time_ms, r.step) for r in batch for name, v in (r.metrics or {}).items()]
            self._sink.metrics(rows)
            counts["metrics"] += len(rows)
            for picture in (r.picture for r in batch if r.picture is not None):
                whole = self._run.store.exists(picture)
                if whole:
                    self._sink.picture(self._run.fetch(picture))
                counts["pictures" if whole else "missing"] += 1
            self._ack = batch[-1].end
            self._put(_ACK, {"mlflow_run": self.mlflow_run} | asdict(self._ack))
        return counts

    def finish(self) -> None:
        """Sets MLflow's final status by the newest attempt's end.json. Call when training is known to have ended."""
        if self._attempt == 0:
            return  # nothing was ever trained here
        end = Attempt(self._attempt, self._run).ended() or {"code": None, "time": now()}
        # 75, saved and wants another attempt, and no end.json: interrupted. The next attempt turns it to RUNNING again.
        status = {0: "FINISHED", 75: "KILLED", None: "KILLED"}.get(end["code"], "FAILED")
        self._sink.terminate(status, _ms(end["time"]))

    def _get(self, path: str) -> dict[str, Any] | None:
        return json.loads(self._run.store.read(path)) if self._run.store.exists(path) else None

    def _put(self, path: str, record: dict[str, Any]) -> None:
        self._run.store.put(path, json.dumps(record).encode())


def artifact_root(uri: str) -> str | None:
    """Where a new experiment's pictures go: beside a SQLite file; None, wherever the server likes, otherwise."""
    if not uri.startswith("sqlite:///"):
        return None
    file = Path(uri.removeprefix("sqlite:///")).absolute()
    return str(file.parent / "mlartifacts")  # MLflow itself would take the working directory


def _batches(records: Iterable[journal.Record]) -> Iterator[list[journal.Record]]:
    """Records in lists of at most MAX_METRICS_PER_BATCH metrics together; a larger record stands alone."""
    batch: list[journal.Record] = []
    size = 0
    for record in records:
        more = len(record.metrics or {})
        if batch and size + more > MAX_METRICS_PER_BATCH:
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += more
    if batch:
        yield batch


def _tags(run: Run) -> dict[str, str]:
    parent = json.dumps(run.parent) if run.parent is not None else None
    tags = {"fitv2.science_hash": run.science_hash, "fitv2.plan_hash": run.plan_hash, "fitv2.parent": parent}
    return {key: value for key, value in tags.items() if value is not None}


def _ms(iso: str) -> int:
    return round(datetime.fromisoformat(iso).timestamp() * 1000)
