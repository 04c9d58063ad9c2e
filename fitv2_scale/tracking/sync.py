"""Publishing from anywhere: what `fitv2 track sync` does. Loads mlflow."""

import os
import time
from collections.abc import Callable
from typing import Any

from data_sharding.errors import UserError
from data_sharding.storage.local_store import LocalStore
from fitv2_scale.run.log import newest_attempt
from fitv2_scale.run.redact import redact
from fitv2_scale.run.run import Attempt, Run
from fitv2_scale.tracking.destination import resolve_uri, why_journal_only
from fitv2_scale.tracking.locks import Lock, Writer
from fitv2_scale.tracking.publisher import Publisher, ServerError
from fitv2_scale.tracking.state import get
from fitv2_scale.tracking.uploader import Patience, Process, attempt_has_ended

_SILENT_S = 900.0  # a trainer on another node whose journal has not grown for so long is taken for dead


def sync(
    run_url: str,
    uri: str,
    experiment: str,
    patience: Patience = Patience(),  # noqa: B008 - immutable
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Publishes everything committed, and what is live, once, from anywhere.

    Returns {"metrics": 1200, "pictures": 3, "missing": 0, "refused": 0, "mlflow_run": "8d0f…",
    "uri": "sqlite:////runs/mlflow.db"} (see ``Publisher.publish``). ``say`` takes a sentence about what MLflow does not
    take. Raises UserError if there is no such run, if MLflow is not there, or while training's own uploader is at it.
    """
    run, uri = Run.open(run_url), resolve_uri(run_url, uri)
    with Lock(run) as lock:
        deadline = time.monotonic() + patience.last_pass
        while not lock.held():
            if not attempt_has_ended(run) or time.monotonic() > deadline:
                raise UserError(f"{run.url} is being published by another uploader; leave it to that one.")
            time.sleep(patience.poll)
        try:
            publisher = Publisher(run, uri, experiment, say)
            with Writer(uri, patience.last_pass):
                counts = publisher.publish()
                if not _is_training(run):
                    publisher.finish()
        except ServerError as error:
            raise UserError(
                f"MLflow at {redact(uri)} does not take the journal of {run.url} ({error}); nothing is lost, "
                "so run `fitv2 track sync` again when it is back."
            ) from error
    return counts | {"mlflow_run": publisher.mlflow_run, "uri": redact(uri)}


def _is_training(run: Run) -> bool:
    """Whether the newest attempt may be at work. MLflow shows it as RUNNING then, else as it ended, or as KILLED."""
    if attempt_has_ended(run):
        return False
    if not isinstance(run.store, LocalStore):
        return True  # nobody can tell from here
    attempt = Attempt(newest_attempt(run.log.entries()), run)
    start = get(run.store, f"{attempt.path}/start.json") or {}
    if start.get("hostname") == os.uname().nodename and "pid" in start:
        return Process(start["pid"]).alive()
    configured = run.config.get("tracking", {}).get("uri", "auto")
    if configured != "none" and why_journal_only(run.url, configured) is None:
        return False  # its uploader would hold the lock
    times = [file.stat().st_mtime for file in (attempt.folder / "journal").glob("*.jsonl")]
    return time.time() - max(times, default=0.0) < _SILENT_S
