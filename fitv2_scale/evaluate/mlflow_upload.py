"""Figures of `fitv2 evaluate` to the run's place in MLflow, at the step of the weights, as evaluate/<label>/fid."""

from datetime import datetime
from typing import Any

from fitv2_scale.evaluate.results import FIGURES
from fitv2_scale.run.run import Run
from fitv2_scale.tracking.destination import resolve_uri

_PLACE = "tracking/mlflow.json"  # which the uploader writes


def publish(run: Run, results: list[dict[str, Any]]) -> str:
    """Sends them, and says so in a sentence. That MLflow cannot be reached is no error: the run keeps the figures."""
    uri = run.config["tracking"]["uri"]
    if uri == "none":
        return "MLflow: none (tracking.uri)"
    if (place := run.store.read_json(_PLACE)) is None:
        return f"MLflow does not know the run yet: `fitv2 track sync {run.url}`, then the same call again sends them"
    # Only here: mlflow takes seconds to import, and training never does.
    from fitv2_scale.tracking.mlflow_writer import ServerError, known_run

    at = place["mlflow_run"]
    rows = [
        (f"evaluate/{r['label']}/{name}", r[name], _ms(r["time"]), r["step"])
        for r in results
        for name in FIGURES
        if r[name] is not None
    ]
    try:
        refused = known_run(resolve_uri(run.url, uri), at).log_metrics(rows)
    except ServerError as error:
        return (
            f"MLflow does not take the figures ({error}): `fitv2 track sync {run.url}`, then the same call again sends "
            "them, and makes nothing anew"
        )
    return f"MLflow: {len(rows)} figures in run {at}" + "".join(f"; refused {why}" for why in refused)


def _ms(iso: str) -> int:
    return round(datetime.fromisoformat(iso).timestamp() * 1000)
