"""Saves a report of curves: tables, JSON and plots in a folder, and all of them in an MLflow run."""

import csv
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_sharding.errors import UserError
from data_sharding.storage.failures import as_sentence
from data_sharding.storage.local_store import LocalStore
from fitv2_scale.planning.scaling.curves_report import Analysis, CurvesOptions
from fitv2_scale.planning.scaling.plots import families_plot, fid_plot, frontier_plot, loss_plot
from fitv2_scale.planning.scaling.predictions import PREDICTIONS
from fitv2_scale.run.redact import redact

CURVES_ID = "fitv2.curves_id"  # the tag of such a run; training runs do not have it
_COLUMNS = ("name", "parameters", "batch", "steps", "images", "flops", "gpu_hours", "value", "points")


def draw(analysis: Analysis, options: CurvesOptions) -> list[Path]:
    """Draws the plots for which there are data, and returns their files."""
    files = []
    with as_sentence(options.folder):
        options.folder.mkdir(parents=True, exist_ok=True)
        if analysis.laws:
            files.append(options.folder / "loss.png")
            loss_plot(analysis.laws, analysis.metric, files[-1])
        if analysis.fids:
            files.append(options.folder / "fid.png")
            fid_plot(analysis.fids, options.target_fid, files[-1])
        for i, comparison in enumerate(analysis.comparisons, start=1):
            files.append(options.folder / f"families{i}.png")
            families_plot(comparison, files[-1])
        if analysis.surface:
            files.append(options.folder / "frontier.png")
            frontier_plot([curve for curve, _ in analysis.laws], analysis.surface, analysis.metric, files[-1])
    return files


def write(report: dict[str, Any], text: str, folder: Path) -> list[Path]:
    """Writes curves.json, curves.txt and the table of runs as runs.csv. Returns them, with predictions.jsonl if there
    is one."""
    files = [folder / "curves.json", folder / "curves.txt"]
    LocalStore(str(folder)).put_json(files[0].name, report, indent=2)
    with as_sentence(folder):
        files[1].write_text(text + "\n")
        if report["runs"]:
            files.append(folder / "runs.csv")
            with open(files[-1], "w", newline="") as file:
                table = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
                table.writeheader()
                table.writerows(report["runs"])
    return files + [file for file in [folder / PREDICTIONS] if file.exists()]


def publish(report: dict[str, Any], files: Sequence[Path], uri: str, experiment: str) -> dict[str, str]:
    """Creates an MLflow run of its own with the files, and with fits and predictions as metrics. Returns its id, URI
    and experiment. Raises UserError if MLflow fails."""
    # Not at the top: reading journals and plotting needs no mlflow.
    from fitv2_scale.tracking.destination import artifact_root
    from fitv2_scale.tracking.mlflow_writer import Server, ServerError

    now_ms, own = time.time_ns() // 1_000_000, secrets.token_hex(4)
    try:
        run = Server(uri, experiment, artifact_root(uri)).open_run(
            CURVES_ID, own, start_ms=now_ms, name=f"curves-{own}", tags={"fitv2.kind": "curves"}
        )
        run.log_params({"metric": report["metric"] or "fid", "runs": ", ".join(r["name"] for r in report["runs"])})
        run.log_metrics([(name, value, now_ms, step) for name, value, step in _numbers(report)])
        for file in files:
            run.log_artifact(file, "curves")
        run.terminate("FINISHED", time.time_ns() // 1_000_000)
    except ServerError as error:
        raise UserError(
            f"MLflow at {redact(uri)} failed to store the report ({error}); it is in {files[0].parent}"
        ) from error
    return {"run": run.id, "uri": redact(uri), "experiment": experiment}


def _numbers(report: dict[str, Any]) -> Iterator[tuple[str, float, int]]:
    """Name, value and step of each metric."""
    fit = report["surface"]["fit"] if report["surface"] else {}
    yield from ((f"surface/{name}", figure["value"], 0) for name, figure in fit.items())
    for run in report["runs"]:
        yield from ((f"{run['name']}/{name}", figure["value"], 0) for name, figure in (run["fit"] or {}).items())
    for prediction in [*report["predictions"], *report["scored"]]:
        name = f"prediction/{prediction['of'].rpartition('@')[0]}"
        for part in ("value", "low", "high", "measured"):
            if prediction[part] is not None:
                yield f"{name}/{part}", prediction[part], prediction["step"]
