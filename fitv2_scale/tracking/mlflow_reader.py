"""Reads the training runs of an MLflow experiment: names, parameters and metrics."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

# First: it sets MLflow's environment before mlflow is imported.
from fitv2_scale.tracking.mlflow_writer import ServerError, server_errors  # isort: skip

from mlflow import MlflowClient

from fitv2_scale.tracking import tags

__all__ = ["ServerError", "TrackedRun", "training_runs"]


@dataclass(frozen=True)
class TrackedRun:
    """``points`` are name, step, value. ``datasets`` are digests, None if they were not recorded; ``parent`` is the id
    of the run that a fork left."""

    name: str
    params: dict[str, str]
    points: list[tuple[str, int, float]]
    datasets: list[str] | None
    parent: str | None


def training_runs(uri: str, experiment: str, wanted: Callable[[str], bool]) -> Iterator[TrackedRun]:
    """The canonical curve of each training run, with the metrics that are ``wanted``; nothing if there is no such
    experiment. Left out are the live child runs of attempts and the reports of `fitv2 curves`. Raises ServerError.
    """
    with server_errors():
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        for run in _canonical(client, found.experiment_id) if found else []:
            names = [name for name in run.data.metrics if wanted(name)]
            histories = (client.get_metric_history(run.info.run_id, name) for name in names)
            points = [(p.key, p.step, p.value) for history in histories for p in history]
            digests, parent = run.data.tags.get(tags.DATASET), run.data.tags.get(tags.PARENT)
            datasets = digests.split(",") if digests else None
            yield TrackedRun(run.data.tags[tags.RUN_ID], run.data.params, points, datasets, parent)


def _canonical(client: MlflowClient, experiment_id: str) -> Iterator:
    token = None
    while True:
        page = client.search_runs([experiment_id], order_by=["start_time ASC"], page_token=token)
        yield from (run for run in page if tags.RUN_ID in run.data.tags)
        token = page.token
        if not token:
            return
