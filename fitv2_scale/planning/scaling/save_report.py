"""Where a report of curves goes: tables, JSON and pictures into a folder, and all of that into an MLflow run."""

import csv
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_sharding.errors import UserError
from fitv2_scale.planning.scaling.curves_report import Asked, Curves
from fitv2_scale.planning.scaling.plots import fid_picture, frontier_picture, loss_picture
from fitv2_scale.planning.scaling.predictions import KEPT
from fitv2_scale.run.redact import redact

CURVES_ID = "fitv2.curves_id"  # the tag of such a run: no training run has it
_COLUMNS = ("name", "parameters", "batch", "steps", "images", "flops", "gpu_hours", "value", "points")


def draw(found: Curves, asked: Asked) -> list[Path]:
    """The pictures that there is something to show in."""
    asked.folder.mkdir(parents=True, exist_ok=True)
    files = []
    if found.laws:
        files.append(asked.folder / "loss.png")
        loss_picture(found.laws, found.metric, files[-1])
    if found.fids:
        files.append(asked.folder / "fid.png")
        fid_picture(found.fids, asked.target, files[-1])
    if found.surface:
        files.append(asked.folder / "frontier.png")
        frontier_picture([curve for curve, _ in found.laws], found.surface, found.metric, files[-1])
    return files


def write(report: dict[str, Any], text: str, folder: Path) -> list[Path]:
    """curves.json, curves.txt, and the table of runs as runs.csv; predictions.jsonl may lie there already."""
    files = [folder / "curves.json", folder / "curves.txt"]
    files[0].write_text(json.dumps(report, indent=2))
    files[1].write_text(text + "\n")
    if report["runs"]:
        files.append(folder / "runs.csv")
        with open(files[-1], "w", newline="") as file:
            table = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
            table.writeheader()
            table.writerows(report["runs"])
    return files + [file for file in [folder / KEPT] if file.exists()]


def publish(report: dict[str, Any], files: Sequence[Path], uri: str, experiment: str) -> dict[str, str]:
    """Makes an MLflow run of its own, which has the files, and what was fitted and predicted as metrics. Returns its id
    and where it is. Raises UserError if MLflow does not take it."""
    # Not at the top: what reads journals and draws needs no mlflow.
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
            f"MLflow at {redact(uri)} does not take the report ({error}); {files[0].parent} has it"
        ) from error
    return {"run": run.id, "uri": redact(uri), "experiment": experiment}


def _numbers(report: dict[str, Any]) -> Iterator[tuple[str, float, int]]:
    """Name, value and step."""
    fit = report["surface"]["fit"] if report["surface"] else {}
    yield from ((f"surface/{name}", figure["value"], 0) for name, figure in fit.items())
    for run in report["runs"]:
        yield from ((f"{run['name']}/{name}", figure["value"], 0) for name, figure in (run["fit"] or {}).items())
    for prediction in [*report["predictions"], *report["scored"]]:
        name = f"prediction/{prediction['of'].rpartition('@')[0]}"
        for part in ("value", "low", "high", "measured"):
            if prediction[part] is not None:
                yield f"{name}/{part}", prediction[part], prediction["step"]
