"""What stands in MLflow's database of a run, and where tests of the way there keep their runs."""

import sqlite3
from pathlib import Path

import pytest

from fitv2_scale.run.run import Run
from fitv2_scale.tracking.uploader import Timing

QUICK = Timing(poll=0.02, backoff=0.02, longest_backoff=0.1, last_pass=300.0)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder of runs, which all publish to one mlflow.db beside them: making that takes MLflow seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def folder(runs, request) -> Path:
    return runs / request.node.name


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
