"""Losses that do not measure the same are not put on one law, nor compared with a prediction."""

import json

import numpy as np
import pytest

from fitv2_scale.cli.__main__ import main
from fitv2_scale.planning.scaling.read_curves import from_journal
from tests.support.curve_runs import continue_run, make_run

STEPS = np.geomspace(1000, 400_000, 30).astype(int)
DATA = {"datasets": ["5c84" + "0" * 60], "validation": ["77e1" + "0" * 60]}
VALIDATED = {"val_loss": np.linspace(1, 0.5, len(STEPS)), "val_loss_ema": np.linspace(1, 0.5, len(STEPS))}


@pytest.fixture
def report(capsys, tmp_path):
    """``report(runs, *words)``: what `fitv2 curves` prints with --json."""

    def call(runs, *words: str) -> dict:
        capsys.readouterr()
        out = ["--out", str(tmp_path / "out"), "--uri", "none", "--json"]
        assert main(["curves", *(run.url for run in runs), *out, *words]) == 0
        return json.loads(capsys.readouterr().out)

    return call


@pytest.mark.parametrize(
    "other, metrics, difference",
    [
        ({}, {}, None),
        ({"facts": {**DATA, "datasets": ["9a1b" + "0" * 60]}}, {}, "datasets: 5c84000000000000 and 9a1b000000000000"),
        ({"facts": {**DATA, "datasets": DATA["datasets"] * 2}}, {}, "datasets: "),
        ({"facts": {}}, {}, None),  # of an earlier version: its data are not known
        ({"changes": {"flow": {"label_dropout": 0.2}}}, {}, "flow.label_dropout: 0.1 and 0.2"),
        ({"changes": {"flow": {"t_sampler": "uniform"}}}, {}, "flow.t_sampler: logit_normal and uniform"),
        ({"changes": {"objective": "ddpm"}}, {}, "objective: flow and ddpm"),
        ({"changes": {"objective": "flow", "ddpm": {"label_dropout": 0.2}}}, {}, None),  # which a flow does not use
        ({"changes": {"data": {"views": "crop"}}}, {}, "data.views: mixed and crop"),
        ({"changes": {"init_from": "runs/first@1"}}, {}, "begins with: random weights and other weights"),
        (
            {"parent": {"run": "first-1", "url": "/first", "step": 1}},
            {},
            "begins with: random weights and other weights",
        ),
        ({"changes": {"optimizer": {"lr": 1.0}, "batch": {"images": 512}, "ema": {"decay": 0.5}, "seed": 3}}, {}, None),
        ({"changes": {"flow": {}, "validation": {}}}, {}, None),
        ({"facts": {**DATA, "validation": ["9a1b" + "0" * 60]}}, VALIDATED, "validation datasets: 77e1"),
        ({"facts": {**DATA, "validation": ["9a1b" + "0" * 60]}}, {}, None),  # its training loss means the same
        ({"changes": {"validation": {"timesteps": 4}}}, VALIDATED, "validation.timesteps: 8 and 4"),
        ({"changes": {"validation": {"images": 64}}}, {}, None),
    ],
)
def test_a_law_over_sizes_needs_losses_that_mean_the_same(report, tmp_path, other, metrics, difference):
    runs = [make_run(tmp_path / s, s, STEPS, facts=DATA, **metrics) for s in ("s2", "b2", "l2")]
    runs.append(make_run(tmp_path / "xl2", "xl2", STEPS, **{"facts": DATA, **other}, **metrics))
    found = report(runs)
    assert len(found["runs"]) == 4 and all(run["fit"] for run in found["runs"])
    if difference is None:
        assert found["surface"] is not None and found["why_no_surface"] is None
    else:
        assert found["surface"] is None
        metric = "val_loss_ema" if metrics else "loss"
        between = f"there is no law over sizes: {runs[0].id} and {runs[3].id} do not measure the same {metric} ("
        assert found["why_no_surface"].startswith(between) and difference in found["why_no_surface"]


HELD_OUT = {"validation": ["77e1" + "0" * 60], "validation_grid": {"images": 256, "timesteps": 8}}


@pytest.mark.parametrize(
    "facts,steps",
    [
        (HELD_OUT, [1000, 2000, 3000, 4000]),
        (HELD_OUT | {"validation": ["9a1b" + "0" * 60]}, [3000, 4000]),
        (HELD_OUT | {"validation_grid": {"images": 256, "timesteps": 4}}, [3000, 4000]),
        ({"validation": HELD_OUT["validation"]}, [1000, 2000, 3000, 4000]),  # of an earlier version
    ],
)
def test_a_validation_loss_is_read_from_the_newest_validation_on(tmp_path, caplog, facts, steps):
    losses = {"loss": [0.6, 0.5], "val_loss": [0.5, 0.4]}
    run = make_run(tmp_path / "b2", "b2", [1000, 2000], facts=HELD_OUT, val_loss=losses["val_loss"])
    continue_run(run, [3000, 4000], facts, **losses)
    curve = from_journal(run.url)
    assert curve.series["val_loss"].steps.tolist() == steps
    assert curve.series["loss"].steps.tolist() == [1000, 2000, 3000, 4000]
    assert ("2 validation losses on other images or times than the newest are left out" in caplog.text) == (
        len(steps) == 2
    )
    assert curve.meaning["validation datasets"] == facts["validation"][0]
    assert curve.meaning["validation.timesteps"] == str(facts.get("validation_grid", {"timesteps": 8})["timesteps"])


def test_a_mixture_by_other_weights_is_other_data(report, tmp_path):
    two = {"data": {"url": ["a", "b"], "weights": [1.0, 1.0]}}
    runs = [make_run(tmp_path / s, s, STEPS, changes=two, facts=DATA) for s in ("s2", "b2")]
    two["data"]["weights"] = [3.0, 1.0]
    runs.append(make_run(tmp_path / "l2", "l2", STEPS, changes=two, facts=DATA))
    assert "data.weights: [1.0, 1.0] and [3.0, 1.0]" in report(runs)["why_no_surface"]


def test_a_prediction_is_scored_by_losses_that_mean_the_same(report, tmp_path):
    first = make_run(tmp_path / "b2", "b2", STEPS, facts=DATA)
    (made,) = report([first], "--predict", "fitv2_b2@1000000")["predictions"]
    assert made["meaning"]["datasets"] == DATA["datasets"][0]
    long = np.geomspace(1000, 1_000_000, 60).astype(int)
    other = make_run(tmp_path / "other", "b2", long, facts={"datasets": ["9a1b"]})
    assert report([other])["scored"][0]["measured"] is None
    same = make_run(tmp_path / "same", "b2", long, facts=DATA)
    assert report([same])["scored"][0]["measured"] is not None
    assert report([other, same])["scored"] == report([same])["scored"]


def test_a_prediction_for_another_objective_is_refused(tmp_path, capsys):
    run = make_run(tmp_path / "b2", "b2", STEPS, changes={"flow": {"t_sampler": "uniform"}})
    words = ["--out", str(tmp_path / "out"), "--uri", "none", "--predict", "fitv2_b2@1000000"]
    assert main(["curves", run.url, *words]) == 2
    assert "cannot be predicted: the runs and its config differ (flow.t_sampler: uniform and" in capsys.readouterr().err


def test_ddpms_are_compared_by_their_own_keys(report, tmp_path):
    changes = {"objective": "ddpm", "flow": {"t_sampler": "uniform"}}
    runs = [make_run(tmp_path / s, s, STEPS, facts=DATA, changes=changes) for s in ("s2", "b2")]
    other = {"objective": "ddpm", "ddpm": {"label_dropout": 0.2}, "model": {"outputs": 2}}
    alike = make_run(tmp_path / "l2", "l2", STEPS, facts=DATA, changes={"objective": "ddpm"})
    assert report([*runs, alike])["surface"] is not None
    runs.append(make_run(tmp_path / "xl2", "xl2", STEPS, facts=DATA, changes=other))
    assert "(ddpm.label_dropout: 0.1 and 0.2; model.outputs: 1 and 2)" in report(runs)["why_no_surface"]


def test_a_prediction_of_before_there_were_objectives_is_of_a_flow(report, tmp_path):
    """It names none, and is not scored by a DDPM of the same network."""
    report([make_run(tmp_path / "b2", "b2", STEPS)], "--predict", "fitv2_b2@1000000")
    file = tmp_path / "out" / "predictions.jsonl"
    made = json.loads(file.read_text())
    assert made["meaning"].pop("objective") == "flow"
    file.write_text(json.dumps(made) + "\n")
    long = np.geomspace(1000, 1_000_000, 60).astype(int)
    ddpm = make_run(tmp_path / "ddpm", "b2", long, changes={"objective": "ddpm"})
    assert report([ddpm])["scored"][0]["measured"] is None
    assert report([make_run(tmp_path / "flow", "b2", long)])["scored"][0]["measured"] is not None


def test_one_curve_of_fids_has_one_reference_and_one_network(tmp_path, caplog):
    run = make_run(tmp_path / "b2", "b2", STEPS)
    for step, network, reference, time in (
        (100, "a", {"sha256": "1", "source": "here.npz"}, "2025-06-01"),
        (200, "a", {"sha256": "1", "source": "there.npz"}, "2025-06-04"),
        (300, "b", {"sha256": "1", "source": "here.npz"}, "2025-06-02"),
        (400, "a", {"sha256": "2", "source": "here.npz"}, "2025-06-03"),
    ):
        cell = {"label": "32x48", "step": step, "fid": float(step), "network": network, "reference": reference}
        run.store.put_json(f"evaluations/{step}.json", {"cells": [cell | {"time": time}]})
    series = from_journal(run.url).series["evaluate/32x48/fid"]
    assert (series.steps.tolist(), series.values.tolist()) == ([100, 200], [100.0, 200.0])
    assert "2 FIDs of 32x48 are left out: the newest has another network, reference" in caplog.text


@pytest.mark.parametrize(
    "key,first,newest,name",
    [
        ("seed", 0, 7, "seed"),
        ("classes", 5, 2, "number of classes"),
        ("class_numbers", "aa", "bb", "choice of classes"),
        ("guided_channels", "all", "three", "guided channels"),
        ("attention_scale", "none", "paper", "attention scale"),
        ("codec", "aa", "bb", "codec"),
        ("atol", 1e-6, 1e-3, "atol"),
        ("rtol", 1e-3, 1e-2, "rtol"),
    ],
)
def test_fids_of_other_images_are_not_on_one_curve(tmp_path, caplog, key, first, newest, name):
    """One of an earlier version, which did not record it, is."""
    run = make_run(tmp_path / "b2", "b2", STEPS)
    for step, value in ((100, {key: first}), (200, {}), (300, {key: newest})):
        cell = {"label": "32x48", "step": step, "fid": float(step), "time": f"2025-06-0{step // 100}"} | value
        run.store.put_json(f"evaluations/{step}.json", {"cells": [cell]})
    assert from_journal(run.url).series["evaluate/32x48/fid"].steps.tolist() == [200, 300]
    assert f"1 FIDs of 32x48 are left out: the newest has another {name}" in caplog.text


def test_a_damaged_result_leaves_out_its_own_fids(tmp_path, caplog):
    run = make_run(tmp_path / "b2", "b2", STEPS)
    run.store.put_json("evaluations/100.json", {"cells": [{"label": "32x48", "step": 100, "fid": 8.0}]})
    run.store.put("evaluations/200.json", b"{")
    assert from_journal(run.url).series["evaluate/32x48/fid"].values.tolist() == [8.0]
    assert "its FIDs are left out: " in caplog.text
