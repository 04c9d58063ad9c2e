"""A real MLflow server, and all that dies under way: each point arrives once, in order. Logins and private CAs."""

import base64
import math
import os
import signal
import sys

import pytest

from data_sharding.errors import UserError
from fitv2_scale.tracking.journal import Journal
from fitv2_scale.tracking.sync import sync
from tests.services.tls_proxy import TlsProxy
from tests.support.journal_writers import DIGEST, make
from tests.support.mlflow_queries import Database, check_child, check_curves
from tests.support.simulated_trainer import start_trainer, uploader_of
from tests.support.waiting import wait

pytestmark = [pytest.mark.mlflow, pytest.mark.timeout(1200)]


def test_every_point_arrives_once_whatever_dies(mlflow_server, tmp_path):
    """100K steps. The server is late and then crashes, the uploader is killed twice, the trainer once."""
    run, steps = make(tmp_path / "run"), 100_000
    database = Database(mlflow_server, run)
    trainer = start_trainer(tmp_path / "run", mlflow_server.uri, 0, 60_000, 12, "hang")
    os.kill(uploader_of(trainer), signal.SIGKILL)  # before it has reached the server
    mlflow_server.wait()
    wait("1000 points", lambda: database.count() > 1000)
    os.kill(uploader_of(trainer), signal.SIGKILL)
    wait("4000 points", lambda: database.count() > 4000)
    mlflow_server.stop()
    trainer.kill()
    trainer.wait()
    mlflow_server.start()
    assert start_trainer(tmp_path / "run", mlflow_server.uri, 60_000, steps, 12, "end").wait() == 0
    mlflow_server.wait()
    wait("the end", lambda: database.status(database.canonical()) == "FINISHED")
    check_curves(database, run, steps)
    check_child(database, run, 1, "KILLED")
    check_child(database, run, 2, "FINISHED")


def test_a_login_a_private_ca_and_values_that_are_no_numbers(mlflow_server, tmp_path, monkeypatch):
    mlflow_server.wait()
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
    with TlsProxy(tmp_path, mlflow_server.port, {basic, "Bearer t0ken-hunter2"}) as proxy:
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

    database = Database(mlflow_server, run)
    rows = database.ask("select key, value, is_nan from metrics where run_uuid = ?", database.canonical())
    largest = sys.float_info.max  # as MLflow keeps an infinity in SQL
    assert sorted(rows) == [("down", -largest, 0), ("loss", 0.0, 1), ("odd_name", 1.0, 0), ("up", largest, 0)]
    places = [file for file in (*tmp_path.rglob("*"), *mlflow_server.folder.rglob("*")) if file.is_file()]
    assert len(places) > 10 and not [file for file in places if b"hunter2" in file.read_bytes()]
