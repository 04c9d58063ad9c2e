"""What MLflow's database, a file or a server's, holds of a run."""

import sqlite3
from collections import defaultdict
from pathlib import Path

from fitv2_scale.run.run import Run
from fitv2_scale.tracking import journal
from fitv2_scale.tracking.uploader import Timing
from tests.services.mlflow_server import MlflowServer
from tests.support.simulated_trainer import WINDOW

QUICK = Timing(poll=0.02, backoff=0.02, longest_backoff=0.1, last_pass=300.0)


def published(folder: Path) -> dict:
    """What MLflow's database holds for the run at ``folder``: rows as they are, so that duplicates show."""
    run = Run.open(str(folder))
    with sqlite3.connect(folder.parent / "mlflow.db", timeout=60) as db:
        found = db.execute("select run_uuid from tags where key = 'fitv2.run_id' and value = ?", (run.id,)).fetchall()
        assert len(found) == 1, f"{len(found)} MLflow runs for one run"
        return contents(db, found[0][0])


def contents(db: sqlite3.Connection, uuid: str) -> dict:
    def all_of(query: str) -> list:
        return db.execute(query, (uuid,)).fetchall()

    status, start, end, artifacts = all_of(
        "select status, start_time, end_time, artifact_uri from runs where run_uuid=?"
    )[0]
    return {
        "metrics": all_of(
            "select step, key, value, is_nan, timestamp from metrics where run_uuid=? order by step, key"
        ),
        "params": dict(all_of("select key, value from params where run_uuid=?")),
        "tags": dict(all_of("select key, value from tags where run_uuid=?")),
        "status": status,
        "start": start,
        "end": end,
        "artifacts": Path(artifacts.removeprefix("file://")),
    }


def steps(folder: Path) -> list[int]:
    return [row[0] for row in published(folder)["metrics"]]


class Database:
    """What the server's database holds of a run: rows as they are, so that duplicates show."""

    def __init__(self, server: MlflowServer, run: Run):
        self._file, self._run = server.db, run

    def ask(self, query: str, *values) -> list[tuple]:
        with sqlite3.connect(self._file, timeout=60) as db:
            return db.execute(query, values).fetchall()

    def uuids(self, tag: str, value: str) -> list[str]:
        query = "select run_uuid from tags where key = ? and value = ?"
        return [row[0] for row in self.ask(query, tag, value)] if self._file.exists() else []

    def canonical(self) -> str | None:
        return next(iter(self.uuids("fitv2.run_id", self._run.id)), None)

    def count(self) -> int:
        try:
            return self.ask("select count(*) from metrics where run_uuid = ?", self.canonical())[0][0]
        except sqlite3.OperationalError:  # no such table yet
            return 0

    def curves(self, uuid: str) -> dict[str, list[tuple[int, float]]]:
        """(step, value) of each key, in the order in which the rows were written."""
        found = defaultdict(list)
        for key, *row in self.ask("select key, step, value from metrics where run_uuid = ? order by rowid", uuid):
            found[key].append(tuple(row))
        return found

    def status(self, uuid: str) -> str:
        return self.ask("select status from runs where run_uuid = ?", uuid)[0][0]

    def tags(self, uuid: str) -> dict[str, str]:
        return dict(self.ask("select key, value from tags where run_uuid = ?", uuid))


def check_curves(database: Database, run: Run, steps: int, measured: int | None = None) -> None:
    """The canonical run is the journal's curve, each point once and in order."""
    expected = defaultdict(list)
    for record in journal.read(run):
        for key, value in record.metrics.items():
            expected[key].append((record.step, value))
    assert [step for step, _ in expected["loss"]] == list(range(WINDOW, steps + 1, WINDOW))
    (uuid,) = database.uuids("fitv2.run_id", run.id)
    assert database.curves(uuid) == expected
    assert (
        database.tags(uuid)["fitv2.lag"]
        == f"{(measured or steps) - steps} steps: {measured or steps} measured, {steps} committed"
    )


def check_child(database: Database, run: Run, attempt: int, status: str) -> None:
    """It is linked, thin, and a subset of what the attempt measured."""
    (uuid,) = database.uuids("fitv2.live_id", f"{run.id}/{attempt}")
    measured = [r for r in journal.read_attempt(run, journal.Position(attempt)) if r.metrics]
    curves = database.curves(uuid)
    assert set(curves) == {"loss", "grad_norm", "lr", "images_per_second", "lag_steps"}
    assert curves["loss"] == [(r.step, r.metrics["loss"]) for r in measured[::10]]
    assert database.tags(uuid)["mlflow.parentRunId"] == database.canonical()
    assert database.status(uuid) == status
