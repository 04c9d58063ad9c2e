"""A real MLflow server, and all that dies under way: each point arrives once, in order. Logins and private CAs."""

import base64
import math
import os
import signal
import sqlite3
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import tests.support.simulated_trainer as simulated
from data_sharding.errors import UserError
from fitv2_scale.run.run import Run
from fitv2_scale.tracking import journal
from fitv2_scale.tracking.journal import Journal
from fitv2_scale.tracking.sync import sync
from tests.services.mlflow_server import MlflowServer
from tests.services.tls_proxy import TlsProxy
from tests.support.journal_writers import DIGEST, make
from tests.support.waiting import wait

pytestmark = [pytest.mark.services, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> MlflowServer:
    """Started, but not waited for: that takes it ten seconds."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


def start_trainer(run: Path, uri: str, start: int, until: int, keys: int, then: str) -> subprocess.Popen:
    command = [sys.executable, simulated.__file__, str(run), uri, str(start), str(until), str(keys), then]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def uploader_of(trainer: subprocess.Popen) -> int:
    """The process id of its only child, waited for."""
    children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children")
    return int(wait("the uploader", lambda: children.read_text().split())[0])


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
    assert [step for step, _ in expected["loss"]] == list(range(simulated.WINDOW, steps + 1, simulated.WINDOW))
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


def test_every_point_arrives_once_whatever_dies(server, tmp_path):
    """100K steps. The server is late and then crashes, the uploader is killed twice, the trainer once."""
    run, steps = make(tmp_path / "run"), 100_000
    database = Database(server, run)
    trainer = start_trainer(tmp_path / "run", server.uri, 0, 60_000, 12, "hang")
    os.kill(uploader_of(trainer), signal.SIGKILL)  # before it has reached the server
    server.wait()
    wait("1000 points", lambda: database.count() > 1000)
    os.kill(uploader_of(trainer), signal.SIGKILL)
    wait("4000 points", lambda: database.count() > 4000)
    server.stop()
    trainer.kill()
    trainer.wait()
    server.start()
    assert start_trainer(tmp_path / "run", server.uri, 60_000, steps, 12, "end").wait() == 0
    server.wait()
    wait("the end", lambda: database.status(database.canonical()) == "FINISHED")
    check_curves(database, run, steps)
    check_child(database, run, 1, "KILLED")
    check_child(database, run, 2, "FINISHED")


def test_a_login_a_private_ca_and_values_that_are_no_numbers(server, tmp_path, monkeypatch):
    server.wait()
    run = make(tmp_path / "run", {"model": {"dim": 8}, "tracking": {"password": "hunter2"}})
    attempt = run.claim({"argv": ["--token=hunter2"]})
    log = Journal(attempt.folder, 1, 0)
    log.metrics(1, {"loss": math.nan, "up": math.inf, "down": -math.inf, "odd@name": 1.0})
    (tmp_path / "run" / "samples").mkdir()
    (tmp_path / "run" / "samples" / "1.png").write_bytes(b"picture")
    log.picture(1, "samples/1.png")
    log.seal()
    attempt.commit(1, "steps/1", DIGEST)
    attempt.end(0, "done")
    basic = "Basic " + base64.b64encode(b"me:hunter2").decode()
    with TlsProxy(tmp_path, server.port, {basic, "Bearer t0ken-hunter2"}) as proxy:
        said = []
        for environment, why in [
            ({}, "SSLError|SSL"),
            ({"MLFLOW_TRACKING_SERVER_CERT_PATH": str(proxy.ca)}, "401"),
            ({"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "wrong-hunter2"}, "401"),
        ]:
            for key, value in environment.items():
                monkeypatch.setenv(key, value)
            with pytest.raises(UserError, match=f"failed while .* was published .*({why}).*nothing is lost") as error:
                sync(run.url, proxy.uri, "test")
            said.append(str(error.value))
        proxy.refusal = 403
        with pytest.raises(UserError, match="403") as error:
            sync(run.url, proxy.uri, "test")
        assert "hunter2" not in "".join([*said, str(error.value)])

        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
        counts = sync(run.url, proxy.uri, "test")
        assert (counts["metrics"], counts["pictures"], counts["refused"]) == (4, 1, 0)
        monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
        monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken-hunter2")
        assert sync(run.url, proxy.uri, "test")["metrics"] == 0

    database = Database(server, run)
    rows = database.ask("select key, value, is_nan from metrics where run_uuid = ?", database.canonical())
    largest = sys.float_info.max  # as MLflow keeps an infinity in SQL
    assert sorted(rows) == [("down", -largest, 0), ("loss", 0.0, 1), ("odd_name", 1.0, 0), ("up", largest, 0)]
    places = [file for file in (*tmp_path.rglob("*"), *server.folder.rglob("*")) if file.is_file()]
    assert len(places) > 10 and not [file for file in places if b"hunter2" in file.read_bytes()]
