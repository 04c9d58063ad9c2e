"""The MFU that a plan takes from the table of predictions."""

import json
from dataclasses import replace

import pytest

from data_sharding.errors import UserError
from fitv2_scale.config.load import load_config
from fitv2_scale.planning.forecast import predicted
from fitv2_scale.planning.forecast.assumptions import Assumptions
from fitv2_scale.planning.forecast.plan_report import forecast, to_text
from fitv2_scale.planning.forecast.predicted import how_to_time, read_table, with_prediction, with_row
from tests.support.repository import ROOT

DATA = "data.url=preset:imagenet256"
A_HUNDRED = Assumptions().with_given(peak_tflops=100)  # TFLOP/s
FIGURES = {"gpu": "NVIDIA H200", "peak_tflops": 100.0, "torch": "2", "tokens": 512, "mfu": 0.25}


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


def mfu_of(*overrides: str, assumptions: Assumptions = A_HUNDRED) -> tuple[float, tuple[str, ...]]:
    """The MFU, and the keys that it does not contain."""
    found = with_prediction(assumptions, config("fitv2_3b2", *overrides))
    return found.mfu.value, found.not_in_time


def test_the_same_network_on_the_same_gpu(table):
    assert mfu_of("layout.replicate=1", "layout.max_tokens=4096", "layout.compile=true") == (0.25, ())
    assert "packs of 512 tokens" in with_prediction(A_HUNDRED, config()).mfu.source
    assert mfu_of("model.depth=39") == mfu_of("tracking.peak_tflops=50") == (0.463, ())
    for other in (Assumptions(), Assumptions().on_gpu("A100")):  # 989 and 312 TFLOP/s
        assert mfu_of(assumptions=other) == (0.463, ())
    assert mfu_of(assumptions=A_HUNDRED.on_gpu("A100").with_given(peak_tflops=100)) == (0.463, ())
    assert mfu_of(assumptions=A_HUNDRED.with_given(mfu=0.3)) == (0.3, ())
    source = with_prediction(Assumptions().on_gpu("A100"), config()).mfu.source
    assert source.startswith("MPT-3B on 8 H100") and source.endswith(
        "none is predicted for this network on an A100 of 312 TFLOP/s"
    )


@pytest.mark.parametrize(
    ("keys", "command"),
    [
        (["layout.precision=fp8", "layout.pad_to_multiple_of=16"], "kernels"),
        (["layout.reshard_after_forward=never", "layout.gate_and_value=merged", "layout.kernels=triton"], "kernels"),
        (["layout.attention=flash4"], "kernels"),
        (["layout.checkpointing=full", "layout.prefetch_blocks=2"], "kernels"),
        (["layout.checkpointing=full", "layout.compile=false"], "step"),
        (["layout.tensor=2"], "step"),
        (["layout.engine=zero3"], "step"),
        (["layout.precision=fp32"], "step"),
        (["deterministic=true"], "step"),
    ],
)
def test_keys_that_the_time_does_not_contain_are_named(table, keys, command):
    value, missing = mfu_of(*keys)
    assert value == 0.25 and sorted(missing) == sorted(keys)
    told = how_to_time(config("fitv2_3b2", *keys), replace(A_HUNDRED, not_in_time=missing))
    expected = {"kernels": f"`fitv2 bench kernels CONFIG {' '.join(missing)}` ", "step": "`fitv2 bench step CONFIG "}
    assert told.startswith(expected[command])
    # Nor does a published time contain them, and nothing predicts them for a GPU that has no row.
    other = Assumptions().on_gpu("A100")
    value, missing = mfu_of(*keys, assumptions=other)
    assert value == 0.463 and sorted(missing) == sorted(keys)
    told = how_to_time(config("fitv2_3b2", *keys), replace(other, not_in_time=missing))
    assert told.startswith("`fitv2 bench step CONFIG ")


def test_the_row_with_the_nearest_layout_counts(table):
    rows = with_row(read_table(table), config("fitv2_3b2", "layout.kernels=triton"), FIGURES | {"mfu": 0.3})
    table.write_text(json.dumps(rows))
    assert mfu_of() == (0.25, ()) and mfu_of("layout.kernels=triton") == (0.3, ())
    merged = "layout.gate_and_value=merged"
    assert mfu_of("layout.kernels=triton", merged) == (0.3, (merged,))


def test_keys_that_differ_from_a_measured_step(tmp_path):
    report = {"machine": "NVIDIA A100-SXM4-80GB", "ranks": 1, "seconds_a_step": {"median": 0.5}, "fill": 0.8,
              "images_per_second": 24.0, "flops_a_step": 4e9, "peak_tflops": 312.0}  # fmt: skip
    file = tmp_path / "step.json"

    def missing(layout: dict | None, *overrides: str) -> tuple[str, ...]:
        file.write_text(json.dumps(report | ({} if layout is None else {"layout": layout, "deterministic": True})))
        return mfu_of(*overrides, assumptions=Assumptions().with_benchmarks([str(file)], 1))[1]

    assert missing({"kernels": "triton"}, "layout.kernels=triton", "deterministic=true") == ()
    apart = missing({"kernels": "triton"})
    assert apart == ("layout.kernels=compiled", "deterministic=false")
    assert missing(None, "layout.kernels=triton") == ()  # a report of before does not say
    benched = replace(Assumptions().with_benchmarks([str(file)], 1), not_in_time=apart)
    assert how_to_time(config(), benched).startswith("`fitv2 bench step CONFIG --json`")
    with pytest.raises(UserError, match="step.json is not a report of .*layout.kernel.*: measure again"):
        missing({"kernel": "triton"})


def test_a_network_whose_code_has_changed(table):
    row = read_table(table)[0]
    table.write_text(json.dumps([row | {"network": "older"}]))
    found = with_prediction(A_HUNDRED, config())
    assert found.mfu.source.endswith("not measured; the network's code has changed since")


def test_a_row_takes_the_place_of_the_one_before():
    rows = with_row(with_row([], config(), FIGURES), config("fitv2_xl2"), FIGURES)
    rows = with_row(rows, config(), FIGURES | {"mfu": 0.5})
    assert [(row["model"]["hidden"], row["mfu"]) for row in rows] == [(1152, 0.25), (2304, 0.5)]
    assert len(with_row(rows, config(), FIGURES | {"gpu": "Another"})) == 3


def test_the_table_of_the_package_is_of_this_code():
    """Whoever changes the network predicts again: `fitv2 bench kernels CONFIG … --table`, as its README says."""
    assert {row["network"] for row in read_table()} == {predicted.network_digest()}
