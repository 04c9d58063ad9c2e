"""The small records beside a run, a dataset or a folder of pictures survive what a stranger could have written: whoever
reads one continues, or names the file and says what to do."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_sharding.errors import DataError, UserError
from data_sharding.format.shard import ShardIndex
from data_sharding.storage.json_bytes import from_json
from data_sharding.storage.open_store import open_store
from data_sharding.write import begun
from data_sharding.write.begun import Options, begin, is_finished
from data_sharding.write.shard_task import Part
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.evaluate.results import read_result, write_result
from fitv2_scale.evaluate.sampling.png_folder import read_request
from fitv2_scale.evaluate.suites import results_table
from fitv2_scale.planning.forecast.assumptions import Assumptions
from fitv2_scale.planning.scaling.curves_report import prediction_lines
from fitv2_scale.planning.scaling.meaning import Origin, meaning_of
from fitv2_scale.planning.scaling.predictions import PredictionFile, score
from fitv2_scale.planning.scaling.read_curves import Curve, Series, _fids
from fitv2_scale.run import provenance
from fitv2_scale.run.quarantine import problem_of
from fitv2_scale.run.run import Attempt, Run
from fitv2_scale.tracking.destination import notes_at_start, resolve_uri, settings_of
from fitv2_scale.tracking.identity import published
from fitv2_scale.tracking.live_run import LiveRuns
from fitv2_scale.tracking.publisher import acknowledged
from fitv2_scale.tracking.tags import attempt_tags
from fitv2_scale.tracking.uploader_state import read_state
from launchers.chain import hung_nodes
from tests.support.fuzzing import COUNTS, as_json, edited_bytes, edited_trees, fuzz, one_of

TIME = "2026-01-01T00:00:00.000000+00:00"
MODEL = {"depth": 2, "hidden": 32, "heads": 2, "classes": 5}
CELL: dict[str, Any] = {
    "step": 7, "weights": "run@7", "weights_digest": "ab", "codec": "cd", "label": "32x48-cfg2", "time": TIME,
    "network": "ef", "size": "32x48", "images": 20, "seed": 7, "classes": 5, "cfg": 2.0, "solver": "euler", "steps": 2,
    "rope": "none", "nfe": 4.0, "fid": 1.5, "sfid": None, "is": 2.0, "precision": 0.5, "recall": 0.5,
    "reference": {"source": "r.npz", "size": "32x48", "sha256": "01"}, "conventions": {"pool": 8},
}  # fmt: skip
INDEX = {
    "name": "s",
    "bytes": 9,
    "xxh3_128": "ab",
    "frames": [[0, 9, 9, "cd", 1]],
    "samples": [[1, 0, [[1, 2], [0, 0]]]],
}
SAVES = {
    "machine": "CPU",
    "ranks": 2,
    "bytes": 100,
    "stall_seconds": {"median": 0.0},
    "durable_seconds": {"median": 2.0},
}
STEPS = {
    "machine": "CPU", "ranks": 2, "seconds_a_step": {"median": 0.5}, "images_per_second": 24.0, "fill": 0.8,
    "flops_a_step": 4e9, "peak_tflops": None, "seconds_by_part": {"optimizer": 0.06, "ema": 0.04},
    "layout": {"kernels": "triton", "max_tokens": 4096}, "deterministic": True,
}  # fmt: skip
PREDICTION = {
    "made": TIME, "of": "b2@20", "model": MODEL, "step": 20, "images": 240.0, "metric": "loss", "value": 0.5,
    "low": 0.4, "high": 0.6, "level": 0.9, "by": "sizes", "runs": ["a"], "meaning": {"data.views": "mixed"},
}  # fmt: skip


@dataclass
class Place:
    """A run in ``folder``, with the record under test beside it."""

    folder: Path
    run: Run

    @property
    def url(self) -> str:
        return str(self.folder)


def of_an_attempt(place: Place) -> None:
    start = Attempt(1, place.run).read_start()
    assert attempt_tags(1, start) and Attempt(1, place.run).claimed_by
    LiveRuns(place.run, None, "8d0f", "run")  # type: ignore[arg-type]


def of_tracking(place: Place) -> None:
    published(place.run)
    resolve_uri(place.url, "auto")
    settings_of(place.run)
    notes_at_start(place.run, "sqlite:////nowhere/mlflow.db", "fitv2")


def of_a_cell(place: Place) -> None:
    if found := read_result(place.run.store, "7", "cell"):
        assert found["reference"].items() and results_table([found])
        write_result(place.run.store, "7", "other", CELL)


def of_predictions(place: Place) -> None:
    series = {"loss": Series(np.array([10, 20]), np.array([0.6, 0.5]))}
    curve = Curve("a", ModelConfig(**MODEL), 12, 0, series, meaning_of({}, Origin()))
    for prediction in PredictionFile(place.folder).all():
        assert prediction_lines({"scored": [score(prediction, [curve])], "predictions": []})


def of_a_dataset(place: Place) -> None:
    options = Options("source", "codec", 16, 2, 0.0, "classes")
    is_finished(place.url, options)
    begin(place.url, options, vae=False)


def of_a_shard(place: Place) -> None:
    data = (place.folder / "part.json").read_bytes()
    ShardIndex.from_record(from_json(data, "part.json", Part)["index"])


# path below the run, a valid record, and all that reads it
RECORDS: list[tuple[str, Any, Callable[[Place], object]]] = [
    ("attempts/1/start.json", {"attempt": 1, "time": TIME, "hostname": "n1", "pid": 7, "git": None, "changed": [],
      "gpus": [{"node": "n1", "name": "H100"}], "parameters": 9, "datasets": ["ab"],
      "tracking": {"uri": "auto", "experiment": "fitv2"}}, of_an_attempt),
    ("tracking/live.json", {"mlflow_run": "8d0f", "attempt": 1, "segment": 0, "offset": 8, "seen": 4}, of_an_attempt),
    ("tracking/ack.json", {"mlflow_run": "8d0f", "attempt": 1, "segment": 0, "offset": 8},
     lambda place: acknowledged(place.run, "8d0f")),
    ("tracking/mlflow.json", {"uri": "sqlite:////m.db", "experiment": "fitv2", "mlflow_run": "8d0f", "run": "/runs/x",
      "name": "run-1", "attempt": 1}, of_tracking),
    ("tracking/state.json", {"time": TIME, "trouble": "no", "tell": True}, lambda place: read_state(place.run)),
    ("quarantine/00000002.json", {"entry": 2, "path": "steps/1", "problem": "gone"},
     lambda place: problem_of(place.run, place.run.log.entries()[1])),
    ("attempts/1/hung.json", [{"rank": 1, "node": "n7", "section": "step", "step": 3, "seconds": 31.2, "silent": True}],
     lambda place: hung_nodes(place.run, 0)),
    ("evaluations/7/cell.json", CELL, of_a_cell),
    ("evaluations/7.json", {"step": 7, "fid": 1.5, "cells": [CELL]}, lambda place: list(_fids(place.run.store))),
    ("request.json", {"weights": "a", "seed": 2**64 - 1, "sampling": {"cfg": 2.0}, "images": {"0": [1, 2, 2]}},
     lambda place: read_request(place.url)),
    ("predictions.jsonl", PREDICTION, of_predictions),
    ("saves.json", SAVES, lambda place: Assumptions().with_benchmarks([f"{place.url}/saves.json"], 200)),
    ("steps.json", STEPS, lambda place: Assumptions().with_benchmarks([f"{place.url}/steps.json"], 200)),
    ("source.json", {"git": "4f0c", "diff": ""}, lambda place: provenance.source()),
    ("parts/options.json", {"source": "source", "codec": "codec", "max_tokens": 16, "images_per_shard": 2,
      "holdout": 0.0, "classes": "classes"}, of_a_dataset),
    ("part.json", {"index": INDEX, "skipped": [], "several_frames": 0, "options": "ab"}, of_a_shard),
]  # fmt: skip
NAMES = [path for path, _, _ in RECORDS]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    folder = tmp_path / "run"
    run = Run.open_or_create(str(folder), {"run": str(folder), "tracking": {"uri": "none"}}, {}, None)
    run.claim({}).commit(1, "steps/1", "00")
    monkeypatch.setattr(provenance, "_ROOT", folder)
    monkeypatch.setattr(begun, "_agree_on_software", lambda *_: None)
    return Place(folder, run)


@COUNTS
@pytest.mark.parametrize(("path", "good", "read"), RECORDS, ids=NAMES)
def test_whatever_stands_there(place, path, good, read, count):
    file = place.folder / path
    file.parent.mkdir(parents=True, exist_ok=True)

    def look(data: bytes) -> None:
        file.write_bytes(data)
        read(place)

    look(json.dumps(good).encode())  # it is valid
    fuzz(one_of(as_json(edited_trees([good])), edited_bytes([json.dumps(good).encode()])), look, count)


# What a reader says of a record that is no object of its own: its path, and what to do. The others continue.
SAID = {
    "attempts/1/start.json": "restore it from a backup",
    "tracking/live.json": "remove it, and everything is sent again",
    "tracking/ack.json": "remove it, and everything is sent again",
    "tracking/mlflow.json": "remove it: its MLflow run is found again",
    "evaluations/7/cell.json": "remove it, and it is measured again",
    "request.json": "give another folder",
    "predictions.jsonl": "remove it",
    "saves.json": "measure again, or leave it out",
    "steps.json": "measure again, or leave it out",
    "parts/options.json": r"rm -r .* and write it again",
    "part.json": "restore it from a backup",
}


@pytest.mark.parametrize(("path", "good", "read"), RECORDS, ids=NAMES)
def test_a_record_that_is_none_is_named_with_what_to_do(place, path, good, read, caplog, capsys):
    (place.folder / path).parent.mkdir(parents=True, exist_ok=True)
    (place.folder / path).write_text('{"foreign": 1')
    if path in SAID:
        with pytest.raises(UserError, match=f"{path} .*{SAID[path]}"):
            read(place)
        return
    found = read(place)
    named = {
        "tracking/state.json": str(found),  # nothing: the uploader replaces it
        "quarantine/00000002.json": str(found),
        "attempts/1/hung.json": capsys.readouterr().err,
        "evaluations/7.json": caplog.text,
        "source.json": str(found),  # git is asked instead
    }
    assert path in named[path] or path in ("tracking/state.json", "source.json"), named[path]


def test_results_of_other_versions_are_read(place):
    """An evaluation of a2e80d5 recorded no digest of weights or codec, and knew a reference by its path."""
    store = open_store(place.url)
    old = {key: value for key, value in CELL.items() if key not in ("weights_digest", "codec")}
    old["reference"] = {"source": "photographs", "size": None}
    store.put_json("evaluations/7/old.json", old)
    store.put_json("evaluations/7/foreign.json", {"step": 7})
    write_result(store, "7", "new", CELL | {"images": 10})
    written = store.read_json("evaluations/7.json")
    assert [cell["images"] for cell in written["cells"]] == [20, 10]
    assert [value for _, _, value in _fids(store)] == [1.5, 1.5]
    with pytest.raises(DataError, match=r"evaluations/7/foreign.json is damaged \(label: field required\)"):
        read_result(store, "7", "foreign")
