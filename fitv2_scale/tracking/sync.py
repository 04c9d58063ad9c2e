"""Publishes a run once, from any machine: `fitv2 track sync`. Imports mlflow."""

import os
import time
from collections.abc import Callable
from typing import Any

from data_sharding.errors import UserError
from data_sharding.storage.local_store import LocalStore
from fitv2_scale.run.log import newest_attempt
from fitv2_scale.run.redact import redact
from fitv2_scale.run.run import Attempt, Run
from fitv2_scale.tracking.destination import configured, journal_only_reason, resolve_uri
from fitv2_scale.tracking.locks import RunLock, writer_lock
from fitv2_scale.tracking.publisher import Publisher, ServerError
from fitv2_scale.tracking.uploader import Process, Timing, attempt_has_ended

_SILENT_S = 900.0  # a trainer on another node counts as dead when its journal has not grown for so long


def sync(
    run_url: str,
    uri: str,
    experiment: str,
    timing: Timing = Timing(),  # noqa: B008 - immutable
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Publishes everything that is committed, and the live runs, once.

    Returns {"metrics": 1200, "pictures": 3, "missing": 0, "refused": 0, "mlflow_run": "8d0f…",
    "uri": "sqlite:////runs/mlflow.db"} (see ``Publisher.publish``). ``say`` takes a sentence about each item that
    MLflow refuses. Raises UserError if there is no such run, if MLflow cannot be reached, or while training's own
    uploader publishes.
    """
    run, uri = Run.open(run_url), resolve_uri(run_url, uri)
    with RunLock(run) as lock:
        deadline = time.monotonic() + timing.last_pass
        while not lock.acquire():
            if not attempt_has_ended(run) or time.monotonic() > deadline:
                raise UserError(f"{run.url} is being published by another uploader, which will send everything.")
            time.sleep(timing.poll)
        try:
            publisher = Publisher(run, uri, experiment, say)
            with writer_lock(uri, timing.last_pass):
                counts = publisher.publish()
                if not _is_training(run):
                    publisher.finish()
        except ServerError as error:
            raise UserError(
                f"MLflow at {redact(uri)} failed while {run.url} was published ({error}); nothing is lost: run "
                "`fitv2 track sync` again when MLflow works."
            ) from error
    return counts | {"mlflow_run": publisher.mlflow_run, "uri": redact(uri)}


def _is_training(run: Run) -> bool:
    """Whether the newest attempt may still run. If so, MLflow shows the run as RUNNING, else with its final status."""
    if attempt_has_ended(run):
        return False
    if not isinstance(run.store, LocalStore):
        return True  # there is no way to tell from here
    attempt = Attempt(newest_attempt(run.log.entries()), run)
    start = attempt.read_start()
    if start.get("hostname") == os.uname().nodename and "pid" in start:
        return Process(start["pid"]).alive()
    uri = configured(run).uri
    if uri != "none" and journal_only_reason(run.url, uri) is None:
        return False  # its uploader would hold the lock
    times = [file.stat().st_mtime for file in (attempt.folder / "journal").glob("*.jsonl")]
    return time.time() - max(times, default=0.0) < _SILENT_S
