"""Writes to MLflow: experiments, runs, metrics and artifacts. Imported by the uploader's process, never by training."""

import os

# Set before mlflow is imported, which reads them. The uploader retries by itself and must learn of an outage within
# seconds, whereas MLflow's seven retries take four minutes.
os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true", MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

import json
import logging
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import (
    MAX_ENTITY_KEY_LENGTH,
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
    MAX_TAG_VAL_LENGTH,
)

from fitv2_scale.run.redact import redact
from fitv2_scale.tracking.destination import deleted_sentence, uri_problem
from fitv2_scale.tracking.locks import tables_lock

Row = tuple[str, float, int, int]  # name, value, time in ms, step
_NOT_IN_A_NAME = re.compile(r"[^\w./ -]", re.ASCII)
T = TypeVar("T")

# What fails until somebody acts: words of the error, and what to do.
_LASTING = {
    r"error code 40[13]\b|PERMISSION_DENIED|UNAUTHENTICATED": "set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    r"error code 404\b|ENDPOINT_NOT_FOUND|not a valid JSON": "check that tracking.uri is that of an MLflow server, and "
    "its version",
    r"database schema|Can't locate revision": "use the MLflow version that made the database, or upgrade it with "
    "`mlflow db upgrade URI`",
    "CERTIFICATE_VERIFY_FAILED": "set REQUESTS_CA_BUNDLE or MLFLOW_TRACKING_SERVER_CERT_PATH to its certificate",
    "unable to open database file|readonly database|not a database|disk image is malformed|PermissionError|"
    "FileNotFoundError|NotADirectoryError|Read-only": "check that this user can write there, or give another "
    "tracking.uri",
    "filesystem tracking backend": "give tracking.uri=sqlite:////ABSOLUTE/PATH, the URI of a server, or auto",
    "No module named": "install it, or give another tracking.uri",
}


class ServerError(Exception):
    """A request to MLflow failed: in MLflow, or in the network or storage behind it. The message holds no secrets.

    ``refused``: MLflow understood the request and rejected its content, so sending it again is useless. ``lasting``: it
    fails until somebody does something; the message says what.
    """

    def __init__(self, message: str, refused: bool = False, lasting: bool = False) -> None:
        super().__init__(message)
        self.refused, self.lasting = refused, lasting


class Server:
    """An experiment on an MLflow server, created if it does not exist. The constructor connects. It and every method
    raise ServerError.

    ``uri`` is MLflow's tracking URI; user, password, token and certificates come from the environment, as MLflow
    documents. ``artifact_root`` is where the artifacts of a new experiment go; None leaves it to the server.
    """

    def __init__(self, uri: str, experiment: str, artifact_root: str | None) -> None:
        _silence_logging()
        if problem := uri_problem(uri):
            raise ServerError(problem, lasting=True)
        with server_errors(), tables_lock(uri):
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(experiment)
            if found and found.lifecycle_stage != "active":
                raise ServerError(deleted_sentence(experiment, found.experiment_id), lasting=True)
            self._at = found.experiment_id if found else self._client.create_experiment(experiment, artifact_root)

    def tag_of(self, tag: str, value: str, wanted: str) -> str:
        """The tag ``wanted`` of the run with this tag; "" if it has none, or if there is no such run."""
        with server_errors():
            runs = self._client.search_runs([self._at], f"tags.`{tag}` = '{value}'")
        return next((run.data.tags[wanted] for run in runs if wanted in run.data.tags), "")

    def open_run(
        self, tag: str, value: str, *, start_ms: int, name: str, tags: dict[str, str], known: str | None = None
    ) -> "ServerRun":
        """The run with this tag, created if there is none, and RUNNING from now on.

        If there are several, since two nodes may have created one at the same time, every caller takes the same one:
        that with the MLflow id ``known``, else the oldest. ``tags`` are set in any case. ``start_ms`` is in ms since
        1970.
        """
        with server_errors():

            def find() -> Any:
                runs = self._client.search_runs([self._at], f"tags.`{tag}` = '{value}'")
                order = lambda run: (run.info.run_id != known, run.info.start_time, run.info.run_id)  # noqa: E731
                return min(runs, key=order, default=None)

            run = find()
            if run is None:
                made = self._client.create_run(self._at, start_ms, tags | {tag: value}, run_name=name)
                run = find() or made
                if run.info.run_id != made.info.run_id:
                    self._client.delete_run(made.info.run_id)
            if run.info.status != "RUNNING":
                self._client.update_run(run.info.run_id, "RUNNING")
        opened = ServerRun(self._client, run.info.run_id, frozenset(run.data.params))
        opened.set_tags({key: text for key, text in tags.items() if run.data.tags.get(key) != text})
        return opened


class ServerRun:
    """One MLflow run. Every method raises ServerError."""

    def __init__(self, client: MlflowClient, id: str, params: frozenset[str]) -> None:
        self._client, self.id, self._has = client, id, params
        self._refused: set[str] = set()  # names of metrics

    def log_params(self, values: dict[str, Any]) -> list[str]:
        """Logs the parameters that the run does not have yet: MLflow allows no change. Returns "name: why" of each that
        MLflow refused."""
        named = {_name(k): v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
        rows = [Param(k, v[:MAX_PARAM_VAL_LENGTH]) for k, v in named.items() if k not in self._has]
        refused = self._send(
            rows, MAX_PARAMS_TAGS_PER_BATCH, lambda part: self._client.log_batch(self.id, params=part), lambda p: p.key
        )
        return [f"{name}: {why}" for name, why in refused.items()]

    def log_metrics(self, rows: Sequence[Row]) -> list[str]:
        """Logs rows. Sending one again is harmless: SQL stores drop exact repeats.

        Returns "name: why" of each metric that MLflow refused; it is left out from now on.
        """
        metrics = [Metric(_name(name), value, time_ms, step) for name, value, time_ms, step in rows]
        metrics = [metric for metric in metrics if metric.key not in self._refused]
        refused = self._send(
            metrics, MAX_METRICS_PER_BATCH, lambda part: self._client.log_batch(self.id, part), lambda m: m.key
        )
        self._refused |= refused.keys()
        return [f"{name}: {why}" for name, why in refused.items()]

    def log_artifact(self, file: Path, folder: str) -> None:
        """Uploads a local file as the artifact <folder>/<its name>; replaces one of that name."""
        with server_errors():
            self._client.log_artifact(self.id, str(file), folder)

    def set_tags(self, tags: dict[str, str]) -> None:
        with server_errors():
            for key, value in tags.items():
                self._client.set_tag(self.id, key, value[:MAX_TAG_VAL_LENGTH])

    def terminate(self, status: str, end_ms: int) -> None:
        """Sets the final status: FINISHED, FAILED or KILLED."""
        with server_errors():
            self._client.set_terminated(self.id, status, end_ms)

    def _send(
        self, items: list[T], most: int, send: Callable[[list[T]], object], key: Callable[[T], str]
    ) -> dict[str, str]:
        """Sends ``items``, ``most`` at a time. Finds those that are refused by bisection, leaves them out, and returns
        the reason of each by its ``key``."""
        refused: dict[str, str] = {}
        for i in range(0, len(items), most):
            part = [item for item in items[i : i + most] if key(item) not in refused]
            if not part:
                continue
            try:
                with server_errors():
                    send(part)
            except ServerError as error:
                if not error.refused or not self._is_active():
                    raise
                if len(part) == 1:
                    refused[key(part[0])] = str(error)
                else:
                    refused |= self._send(part, (len(part) + 1) // 2, send, key)
        return refused

    def _is_active(self) -> bool:
        """False once somebody has deleted the run; MLflow then refuses everything."""
        with server_errors():
            return self._client.get_run(self.id).info.lifecycle_stage == "active"


def known_run(uri: str, id: str) -> ServerRun:
    """The run with the MLflow id ``id``, to add metrics to; its status does not change."""
    _silence_logging()
    with server_errors():
        client = MlflowClient(tracking_uri=uri)
        return ServerRun(client, id, frozenset(client.get_run(id).data.params))


def _silence_logging() -> None:
    """Errors are raised as ServerError, which the uploader logs in one line without secrets."""
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


def _name(name: str) -> str:
    """``name`` with the characters that MLflow refuses replaced: one odd metric must not block all others."""
    return os.path.normpath(_NOT_IN_A_NAME.sub("_", name)).lstrip("/.")[:MAX_ENTITY_KEY_LENGTH] or "_"


@contextmanager
def server_errors() -> Generator[None]:
    """Turns any exception inside into a ServerError."""
    try:
        yield
    except ServerError:
        raise
    except Exception as error:  # MLflow lets through whatever its plugins raise: SQLAlchemy's, requests', boto's
        refused = isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE"
        message = redact(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        remedy = next((what for words, what in _LASTING.items() if re.search(words, message)), "")
        raise ServerError(f"{message}; {remedy}" if remedy else message, refused, bool(remedy)) from error
