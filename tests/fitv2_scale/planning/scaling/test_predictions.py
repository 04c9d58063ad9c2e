"""Predictions that were written before, perhaps by another hand, and what they are scored by."""

import json

import numpy as np
import pytest

from data_sharding.errors import UserError
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.planning.scaling.curves_report import prediction_lines
from fitv2_scale.planning.scaling.predictions import PREDICTIONS, PredictionFile, score
from fitv2_scale.planning.scaling.read_curves import Curve, Series

MODEL = ModelConfig(depth=2, hidden=32, heads=2)
LINE = {"of": "x@5", "model": MODEL.model_dump(mode="json"), "step": 5, "images": 20.0, "metric": "loss"}
LINE |= {"value": 0.5, "low": 0.4, "high": 0.6, "level": 0.9, "made": "2026-11-30T12:00:00+00:00", "meaning": {}}


def measured(*values: float) -> Curve:
    """Of 4 images a step."""
    return Curve("a", MODEL, 4, 0, {"loss": Series(np.arange(1, len(values) + 1), np.array(values))}, {})


@pytest.mark.parametrize(
    "change",
    [{"low": None}, {"high": None}, {"images": 0.0}, {"step": -1}, {"model": {}}, {"made": 1}, {"level": None}],
)
def test_a_line_that_is_no_prediction_is_named(tmp_path, change):
    (tmp_path / PREDICTIONS).write_text(json.dumps(LINE) + "\n" + json.dumps(LINE | change) + "\n")
    with pytest.raises(UserError, match="predictions.jsonl has a line that is not a prediction .*: remove it"):
        PredictionFile(tmp_path).all()


def test_a_prediction_is_scored_by_the_run_at_its_step(tmp_path):
    (tmp_path / PREDICTIONS).write_text(json.dumps(LINE) + "\n" + json.dumps(LINE | {"low": None, "high": None}) + "\n")
    with_interval, without = PredictionFile(tmp_path).all()
    curve = measured(9, 8, 7, 6, 0.4, 0.3)
    found = score(with_interval, [curve])
    assert (found["measured"], found["inside"]) == (0.4, True) and found["error"] == pytest.approx(0.25)
    assert score(with_interval, [measured(9, 8, 7, 6, 0.7)])["inside"] is False
    assert score(without, [curve])["inside"] is None
    assert score(with_interval, [measured(9, 8, 7, 6)])["measured"] is None


def test_a_measurement_of_nothing_has_no_relative_error():
    found = score(LINE, [measured(9, 8, 7, 6, 0)])
    assert (found["measured"], found["error"], found["inside"]) == (0, None, False)
    scored = [found, score(LINE, [measured(9, 8, 7, 6, 0.4)])]
    assert prediction_lines({"scored": scored, "predictions": []}) == [
        "x@5, predicted 2026-11-30: loss 0.5, 90 % interval 0.4 to 0.6; measured 0, outside",
        "x@5, predicted 2026-11-30: loss 0.5, 90 % interval 0.4 to 0.6; measured 0.4, error +25.00 %, inside",
    ]
