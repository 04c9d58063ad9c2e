"""The one place that talks to MLflow. Only the uploader's process imports it; training never does."""

import os

# Before the import, which reads them. The uploader has patience of its own: it wants to hear of an outage in seconds,
# where MLflow's seven retries take four minutes.
os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true", MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
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
from fitv2_scale.tracking.sqlite_file import alone

Row = tuple[str, float, int, int]  # name, value, time in ms, step
_NOT_IN_A_NAME = re.compile(r"[^\w./ -]", re.ASCII)
T = TypeVar("T")


class ServerError(Exception):
    """MLflow, or the network or storage behind it, did not do what it was asked. Nothing secret is in the message.

    ``refused``: it was understood and turned down for what it says; sending it again is of no use.
    """

    refused = False


class Server:
    """An experiment, made if there is none. Every method raises ServerError, and so does making one: it connects.

    ``uri`` is MLflow's tracking URI; user, password, token and certificates come from the environment, as MLflow
    documents. ``artifact_root`` is where the pictures of a new experiment go; None leaves it to the server.
    """

    def __init__(self, uri: str, experiment: str, artifact_root: str | None) -> None:
        _quieten()
        with server(), alone(uri):
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(experiment)
            self._at = found.experiment_id if found else self._client.create_experiment(experiment, artifact_root)

    def open_run(
        self, tag: str, value: str, *, start_ms: int, name: str, tags: dict[str, str], known: str | None = None
    ) -> "ServerRun":
        """The run with this tag, made if there is none, and RUNNING from now on.

        Of several, which two nodes may have made at once, all take the same: the one with MLflow id ``known``, else
        the oldest. ``tags`` are set in any case. ``start_ms`` is in ms since 1970.
        """
        with server():

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
        opened.tag({key: text for key, text in tags.items() if run.data.tags.get(key) != text})
        return opened


class ServerRun:
    """One MLflow run. Every method raises ServerError."""

    def __init__(self, client: MlflowClient, id: str, params: frozenset[str]) -> None:
        self._client, self.id, self._has = client, id, params
        self._without: set[str] = set()  # names of metrics that were refused

    def params(self, values: dict[str, Any]) -> list[str]:
        """Logs those that the run has not yet: MLflow refuses to change one. Returns those refused, as "name: why"."""
        named = {_name(k): v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
        rows = [Param(k, v[:MAX_PARAM_VAL_LENGTH]) for k, v in named.items() if k not in self._has]
        refused = self._send(
            rows, MAX_PARAMS_TAGS_PER_BATCH, lambda part: self._client.log_batch(self.id, params=part), lambda p: p.key
        )
        return [f"{name}: {why}" for name, why in refused.items()]

    def metrics(self, rows: Sequence[Row]) -> list[str]:
        """Logs rows. Sending one again is harmless: SQL stores drop exact repeats.

        Returns the names that MLflow refused and that are left out from now on, each as "name: why".
        """
        metrics = [Metric(_name(name), value, time_ms, step) for name, value, time_ms, step in rows]
        metrics = [metric for metric in metrics if metric.key not in self._without]
        refused = self._send(
            metrics, MAX_METRICS_PER_BATCH, lambda part: self._client.log_batch(self.id, part), lambda m: m.key
        )
        self._without |= refused.keys()
        return [f"{name}: {why}" for name, why in refused.items()]

    def picture(self, file: Path) -> None:
        """Puts a local file among the run's artifacts, as samples/<its name>; replaces one of that name."""
        self.artifact(file, "samples")

    def artifact(self, file: Path, folder: str) -> None:
        """Puts a local file among the run's artifacts, as <folder>/<its name>; replaces one of that name."""
        with server():
            self._client.log_artifact(self.id, str(file), folder)

    def tag(self, tags: dict[str, str]) -> None:
        with server():
            for key, value in tags.items():
                self._client.set_tag(self.id, key, value[:MAX_TAG_VAL_LENGTH])

    def terminate(self, status: str, end_ms: int) -> None:
        """Sets the final status: FINISHED, FAILED or KILLED."""
        with server():
            self._client.set_terminated(self.id, status, end_ms)

    def _send(
        self, items: list[T], most: int, send: Callable[[list[T]], None], key: Callable[[T], str]
    ) -> dict[str, str]:
        """Sends ``items``, ``most`` at a time. One that is refused is looked for by halves and left out."""
        refused: dict[str, str] = {}
        for i in range(0, len(items), most):
            part = [item for item in items[i : i + most] if key(item) not in refused]
            if not part:
                continue
            try:
                with server():
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
        """False once somebody deleted it; MLflow then refuses everything."""
        with server():
            return self._client.get_run(self.id).info.lifecycle_stage == "active"


def known_run(uri: str, id: str) -> ServerRun:
    """The run with MLflow id ``id``, for more of its metrics; its status stays as it is."""
    _quieten()
    with server():
        client = MlflowClient(tracking_uri=uri)
        return ServerRun(client, id, frozenset(client.get_run(id).data.params))


def _quieten() -> None:
    """What goes wrong is raised, and logged in one line without secrets."""
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


def _name(name: str) -> str:
    """``name`` with what MLflow refuses in a name replaced: one odd metric must not hold up all the others."""
    return os.path.normpath(_NOT_IN_A_NAME.sub("_", name)).lstrip("/.")[:MAX_ENTITY_KEY_LENGTH] or "_"


@contextmanager
def server() -> Iterator[None]:
    """What goes wrong inside is a ServerError."""
    try:
        yield
    except Exception as error:  # MLflow lets through whatever its plugins raise: SQLAlchemy's, requests', boto's
        said = ServerError(redact(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"))
        said.refused = isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE"
        raise said from error
