"""The one place that talks to MLflow. Only the uploader's process imports it; training never does."""
# ruff: noqa: E402 - the environment is set first

import os

# Before the import, which reads them. The uploader has patience of its own: it wants to hear of an outage in seconds,
# where MLflow's seven retries take four minutes.
os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true", MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.utils.validation import (
    MAX_ENTITY_KEY_LENGTH,
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
)

from fitv2_scale.redact import redact

RUN_ID_TAG = "fitv2.run_id"
_NOT_IN_A_NAME = re.compile(r"[^\w./ -]", re.ASCII)


class ServerError(Exception):
    """MLflow, or the network or storage behind it, did not do what it was asked. Nothing secret is in the message."""


class MlflowSink:
    """One MLflow run: found by its tag ``fitv2.run_id``, or made. Every method raises ServerError.

    ``uri`` is MLflow's tracking URI. ``artifact_root`` is where the pictures of a new experiment go; None leaves it to
    the server. ``start_ms`` is in ms since 1970. ``params`` that the run has already keep their values: MLflow refuses
    to change one.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifact_root: str | None,
        run_id: str,
        start_ms: int,
        tags: dict[str, str],
        params: dict[str, Any],
    ) -> None:
        for noisy in ("mlflow", "alembic"):  # what goes wrong is raised, and logged in one line without secrets
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        with _server():
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(experiment)
            at = found.experiment_id if found else self._client.create_experiment(experiment, artifact_root)
            runs = self._client.search_runs([at], f"tags.`{RUN_ID_TAG}` = '{run_id}'", order_by=["start_time ASC"])
            tags = tags | {RUN_ID_TAG: run_id}
            run = runs[0] if runs else self._client.create_run(at, start_ms, tags, run_name=run_id)
            self.mlflow_run: str = run.info.run_id
            new = {_name(k): v if isinstance(v, str) else json.dumps(v) for k, v in params.items()}
            rows = [Param(k, v[:MAX_PARAM_VAL_LENGTH]) for k, v in new.items() if k not in run.data.params]
            for i in range(0, len(rows), MAX_PARAMS_TAGS_PER_BATCH):
                self._client.log_batch(self.mlflow_run, params=rows[i : i + MAX_PARAMS_TAGS_PER_BATCH])
            if run.info.status != "RUNNING":
                self._client.update_run(self.mlflow_run, "RUNNING")

    def metrics(self, rows: Sequence[tuple[str, float, int, int]]) -> None:
        """Logs (name, value, time in ms, step) rows. Sending a row again is harmless: SQL stores drop exact repeats."""
        metrics = [Metric(_name(name), value, time_ms, step) for name, value, time_ms, step in rows]
        with _server():
            for i in range(0, len(metrics), MAX_METRICS_PER_BATCH):
                self._client.log_batch(self.mlflow_run, metrics[i : i + MAX_METRICS_PER_BATCH])

    def picture(self, file: Path) -> None:
        """Puts a local file among the run's artifacts, as samples/<its name>; replaces one of that name."""
        with _server():
            self._client.log_artifact(self.mlflow_run, str(file), "samples")

    def tag(self, key: str, value: str) -> None:
        with _server():
            self._client.set_tag(self.mlflow_run, key, value)

    def terminate(self, status: str, end_ms: int) -> None:
        """Sets the final status: FINISHED, FAILED or KILLED."""
        with _server():
            self._client.set_terminated(self.mlflow_run, status, end_ms)


def add_metrics(uri: str, mlflow_run: str, rows: Sequence[tuple[str, float, int, int]]) -> None:
    """Logs rows, as ``MlflowSink.metrics`` takes them, to a run that is there, and leaves its status as it is."""
    metrics = [Metric(_name(name), value, time_ms, step) for name, value, time_ms, step in rows]
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    with _server():
        client = MlflowClient(tracking_uri=uri)
        for i in range(0, len(metrics), MAX_METRICS_PER_BATCH):
            client.log_batch(mlflow_run, metrics[i : i + MAX_METRICS_PER_BATCH])


def _name(name: str) -> str:
    """``name`` with what MLflow refuses in a name replaced: one odd metric must not hold up all the others."""
    return os.path.normpath(_NOT_IN_A_NAME.sub("_", name)).lstrip("/.")[:MAX_ENTITY_KEY_LENGTH] or "_"


@contextmanager
def _server() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # MLflow lets through whatever its plugins raise: SQLAlchemy's, requests', boto's
        raise ServerError(redact(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")) from error
