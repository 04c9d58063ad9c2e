"""Sends the metrics of `fitv2 evaluate` to MLflow, at the step of the weights, for example as evaluate/<label>/fid."""

from datetime import datetime
from typing import Any

from fitv2_scale.evaluate.results import METRICS
from fitv2_scale.run.redact import redact
from fitv2_scale.run.run import Run
from fitv2_scale.tracking.destination import resolve_uri, settings_of
from fitv2_scale.tracking.identity import published


def publish(run: Run, results: list[dict[str, Any]]) -> str:
    """Sends the metrics and returns a sentence about it. A failure is no error, since the run stores the metrics."""
    uri, experiment = settings_of(run)
    if uri == "none":
        return "MLflow: none (tracking.uri)"
    target, place = resolve_uri(run.url, uri), published(run)
    if place.mlflow_run is None or place.moved_from or (place.uri, place.experiment) != (redact(target), experiment):
        return f"MLflow does not know the run yet: run `fitv2 track sync {run.url}`, then this command again"
    # Not at the top: mlflow takes seconds to import, and training must never import it.
    from fitv2_scale.tracking.mlflow_writer import ServerError, known_run

    at = place.mlflow_run
    rows = [
        (f"evaluate/{r['label']}/{name}", r[name], _ms(r["time"]), r["step"])
        for r in results
        for name in METRICS
        if r[name] is not None
    ]
    try:
        refused = known_run(target, at).log_metrics(rows)
    except ServerError as error:
        return (
            f"MLflow did not store the metrics ({error}): run `fitv2 track sync {run.url}`, then this command again, "
            "which only sends them"
        )
    return f"MLflow: {len(rows)} metrics in run {at}" + "".join(f"; refused {why}" for why in refused)


def _ms(iso: str) -> int:
    return round(datetime.fromisoformat(iso).timestamp() * 1000)
