"""The MFU that a plan takes from the table of predictions."""

import json

import pytest

from fitv2_scale.config.load import load_config
from fitv2_scale.planning.forecast import predicted
from fitv2_scale.planning.forecast.assumptions import PUBLISHED_MFU, Assumptions
from fitv2_scale.planning.forecast.plan_report import forecast, to_text
from fitv2_scale.planning.forecast.predicted import read_table, with_prediction, with_row
from tests.support.repository import ROOT

DATA = "data.url=preset:imagenet256"
FIGURES = {"gpu": "A GPU", "peak_tflops": 100.0, "torch": "2", "tokens": 512, "mfu": 0.25}


def config(name: str = "fitv2_3b2", *overrides: str):
    return load_config(str(ROOT / "configs" / f"{name}.yaml"), [DATA, *overrides])


@pytest.fixture
def table(tmp_path, monkeypatch):
    file = tmp_path / "predicted.json"
    file.write_text(json.dumps(with_row([], config(), FIGURES)))
    monkeypatch.setattr(predicted.read_table, "__defaults__", (file,))
    return file


@pytest.mark.parametrize(("name", "low", "high"), [("fitv2_3b2", 0.44, 0.54), ("fitv2_xl2", 0.3, 0.45)])
def test_the_table_that_is_shipped(name, low, high):
    """Its range for 3B/2 is what was once drawn from all guessed rates, and what levers in the code may add."""
    mfu = with_prediction(Assumptions(), config(name)).mfu
    assert low < mfu.value < high
    assert "predicted" in mfu.source and "not measured" in mfu.source and "H200" in mfu.source


def test_a_plan_shows_what_is_predicted():
    text = to_text(forecast(config("fitv2_b2"), 1, 8, Assumptions()))
    assert text.count("predicted by `fitv2 bench kernels` for one NVIDIA H200") == 2


def test_only_the_same_network_and_layout(table):
    peak, same = "tracking.peak_tflops=100", ["layout.replicate=1", "layout.max_tokens=4096"]
    found = with_prediction(Assumptions(), config("fitv2_3b2", peak, *same)).mfu
    assert found.value == 0.25 and "packs of 512 tokens" in found.source
    for other in ("model.depth=39", "layout.checkpointing=full", "layout.compile=false"):
        assert with_prediction(Assumptions(), config("fitv2_3b2", peak, *same, other)).mfu == PUBLISHED_MFU
    assert with_prediction(Assumptions(), config("fitv2_3b2", *same)).mfu == PUBLISHED_MFU  # the peak is 989
    assert with_prediction(Assumptions().with_given(mfu=0.3), config("fitv2_3b2", peak, *same)).mfu.value == 0.3


def test_a_network_whose_code_has_changed(table):
    row = read_table(table)[0]
    table.write_text(json.dumps([row | {"network": "older"}]))
    found = with_prediction(Assumptions(), config("fitv2_3b2", "tracking.peak_tflops=100"))
    assert found.mfu.source.endswith("not measured; the network's code has changed since")


def test_a_row_takes_the_place_of_the_one_before():
    rows = with_row(with_row([], config(), FIGURES), config("fitv2_xl2"), FIGURES)
    rows = with_row(rows, config(), FIGURES | {"mfu": 0.5})
    assert [(row["model"]["hidden"], row["mfu"]) for row in rows] == [(1152, 0.25), (2304, 0.5)]
    assert len(with_row(rows, config(), FIGURES | {"gpu": "Another"})) == 3
