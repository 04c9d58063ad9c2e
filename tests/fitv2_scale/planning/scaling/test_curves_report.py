"""`fitv2 curves` on journals that follow a known law, in folders and in a real MLflow."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_sharding.errors import UserError
from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.load import parse_config
from fitv2_scale.model.counts import forward_flops
from fitv2_scale.planning.scaling.curves_report import _fid_lines
from fitv2_scale.planning.scaling.laws import law_of_run, law_of_sizes
from fitv2_scale.planning.scaling.published_fid import published_curves, steps_to_reach
from fitv2_scale.planning.scaling.read_curves import Curve, Series, common_loss, from_journal, log_binned
from tests.support.curve_runs import BATCH, TOKENS, TRUTH, WARMUP, config, make_run, parameters

STEPS = np.geomspace(1000, 400_000, 60).astype(int)


def curves(capsys, *words: str) -> dict:
    capsys.readouterr()
    assert main(["curves", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words: str) -> str:
    assert main(["curves", *map(str, words)]) == 2
    return capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    """Of runs that publish nothing."""
    return tmp_path


# ---- reading ----


def test_abandoned_branches_are_not_read(folder):
    """What an attempt measured behind its last commit is done again by the next one."""
    run = make_run(folder / "run", "s2", [1000, 2000, 3000])
    lost = run.claim({})
    journal = lost.folder / "journal"
    journal.mkdir(parents=True)
    lines = [{"step": step, "time_ms": 1, "metrics": {"loss": 9.0}} for step in (4000, 5000)]
    (journal / "00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    series = from_journal(run.url).series["loss"]
    assert series.steps.tolist() == [1000, 2000, 3000] and series.values.max() < 2


def test_axes(folder):
    told = {"images": STEPS * 300.0, "flops": STEPS * 7e12, "gpu_hours": STEPS / 100.0}
    plain, full = (from_journal(make_run(folder / n, "b2", STEPS, **m).url) for n, m in (("a", {}), ("b", told)))
    at = np.array([2000.0, 100_000.0])
    a_step = 3 * forward_flops(plain.model, TOKENS) * BATCH
    assert plain.along("images", at) == pytest.approx(at * BATCH)
    assert plain.along("flops", at) == pytest.approx(at * a_step)
    assert plain.along("gpu_hours", at) is None
    assert full.along("images", at) == pytest.approx(at * 300)
    assert full.along("flops", at) == pytest.approx(at * 7e12)
    assert full.along("gpu_hours", at) == pytest.approx(at / 100)


def test_tokens_an_image_are_those_of_the_whole_run():
    """The totals of the last point; without totals the middle of the rates, without rates 256."""
    model, steps = parse_config(config("b2"), "b2").model, np.array([10, 20, 30])

    def flops(**series) -> float:
        known = {name: Series(steps, np.asarray(values, float)) for name, values in series.items()}
        return Curve("a", model, 4, 0, known, {}).flops_an_image()

    totals = {"images": [40, 80, 110], "tokens": [4000, 9000, 11_000]}
    rates = {"images_per_second": [1, 2, 4], "tokens_per_second": [90, 240, 400]}
    assert flops(**totals, **rates) == flops(**rates) == 3 * forward_flops(model, 100)
    assert flops(tokens=[100, 200, 12_000]) == 3 * forward_flops(model, 100)  # 4 images a step
    assert flops() == 3 * forward_flops(model, 256)


def test_the_best_loss_that_all_runs_have(folder):
    better = {"val_loss_ema": np.full(len(STEPS), 0.5)}
    one, both = (from_journal(make_run(folder / n, "s2", STEPS, **m).url) for n, m in (("a", {}), ("b", better)))
    assert common_loss([both]) == "val_loss_ema" and common_loss([one, both]) == "loss"


def test_points_that_are_not_finite_are_left_out(folder):
    broken = np.where(np.arange(len(STEPS)) % 2, np.nan, 0.7)
    curve = from_journal(make_run(folder / "run", "s2", STEPS, val_loss=broken).url)
    assert len(curve.series["val_loss"].steps) == len(STEPS) / 2


def test_thinning_keeps_means():
    steps = np.arange(1, 10_001)
    found = log_binned(Series(steps, steps**-0.5), after=100, bins=20)
    assert len(found.steps) == 20 and found.steps[0] > 100
    assert found.values == pytest.approx(found.steps**-0.5, rel=0.01)


# ---- laws ----


def test_the_law_of_a_run_begins_behind_its_warmup(folder):
    warming = np.where(STEPS <= WARMUP, 5.0, 0.0)
    truth = TRUTH(parameters("b2"), STEPS * BATCH)
    curve = from_journal(make_run(folder / "run", "b2", STEPS, val_loss=truth + warming).url)
    law = law_of_run(curve, "val_loss", draws=10)
    assert law.fit(2e6) == pytest.approx(TRUTH(parameters("b2"), 2e6 * BATCH), rel=1e-3)
    short = from_journal(make_run(folder / "short", "b2", [1000, 2000]).url)
    assert law_of_run(short, "loss").why == "its 2000 steps do not go beyond its warm-up of 5000"


def test_three_sizes_make_a_law_without_an_interval_and_four_one_with(folder):
    runs = [from_journal(make_run(folder / s, s, STEPS, noise=0.001, seed=i).url) for i, s in enumerate(
        ("s2", "b2", "l2", "xl2")
    )]  # fmt: skip
    three = law_of_sizes(runs[:3], "loss", draws=5)
    assert three.refits == () and "no degree of freedom" in three.why_no_interval
    four = law_of_sizes(runs, "loss", draws=5)
    assert len(four.refits) == 5 and four.why_no_interval is None
    assert four.flops_exponent == pytest.approx(1, abs=0.1)
    with pytest.raises(UserError, match="needs runs of at least 3 sizes .*; there are 2"):
        law_of_sizes(runs[:2], "loss")


def test_two_seeds_of_a_size_widen_the_interval(folder):
    def width(offset: float) -> float:
        names = ("s2", "b2", "l2", "xl2", "xl2")
        runs = [
            make_run(folder / f"{offset}-{i}", s, STEPS, noise=1e-4, seed=i, offset=offset * (i == 4))
            for i, s in enumerate(names)
        ]
        law = law_of_sizes([from_journal(run.url) for run in runs], "loss", draws=40)
        return float(np.std([f(3e9, 5e8) for f in law.refits]))

    assert width(0.01) > 5 * width(0.0)


# ---- the published points ----


def test_steps_to_a_target():
    points = Series(np.array([100, 1000]), np.array([40.0, 10.0]))
    assert steps_to_reach(20.0, points) == (pytest.approx(10**2.5), False)
    assert steps_to_reach(10.0, points) == (pytest.approx(1000), False)
    assert steps_to_reach(50.0, points) == (100, True) and steps_to_reach(5.0, points) == (None, False)


def test_the_papers_points_alone(capsys, folder):
    report = curves(capsys, "--published", "--out", folder / "out")
    rows = {(row["name"], row["guidance"]): row for row in report["fid"]["rows"]}
    ours = rows["FiTv2-B/2", "1"]
    assert [p["fid"] for p in ours["points"]] == [26.03, 19.02, 17.70, 16.52]
    assert [p["step"] for p in ours["points"]] == [400_000, 1_000_000, 1_500_000, 2_000_000]
    model = parse_config(config("b2"), "b2").model
    assert ours["points"][0]["flops"] == pytest.approx(4e5 * 256 * 3 * forward_flops(model, 256))
    # FiTv2-B/2 is at 400K where FiT-B/2 is at 1,500K.
    assert ours["steps_to_target"] == 400_000 and ours["at_most"]
    assert rows["FiT-B/2", "1"]["steps_to_target"] == pytest.approx(1_500_000)
    assert 10 < ours["fit"]["E"]["value"] < 16.52 and ours["fit"]["E"]["low"] < ours["fit"]["E"]["high"]
    assert rows["FiT-B/2", "1"]["fit"] is None  # three points: no degree of freedom over
    assert {c.name for c in published_curves()} >= {"FiTv2-XL/2", "FiTv2-3B/2"}
    assert (folder / "out" / "fid.png").exists() and report["runs"] == []
    line = "FiT-B/2              1  400: 36.36  1000: 29.14  1500: 26.08                   1,500,000, 6.97e+19"
    assert line in (folder / "out" / "curves.txt").read_text().splitlines()


def test_the_text_shows_the_last_five_figures_of_a_curve():
    row = {"name": "ours", "guidance": "1", "at_most": False, "steps_to_target": None, "flops_to_target": None}
    row |= {"points": [{"step": 1000 * n, "fid": 30 - n} for n in range(1, 8)], "fit": None, "why": "too few"}
    assert _fid_lines({"target": 9.0, "rows": [row]})[1:] == [
        "ours                 1  3: 27  4: 26  5: 25  6: 24  7: 23                      -",
        "  too few",
    ]


# ---- the command ----


def test_four_sizes_to_a_prediction_that_is_scored_later(capsys, folder):
    hours = {"gpu_hours": STEPS / 50.0, "fid": 300 * (STEPS[-6:] / 1000) ** -0.4}
    runs = [
        make_run(folder / "runs" / s, s, STEPS, noise=0.001, seed=i, **hours).url
        for i, s in enumerate(("s2", "b2", "l2", "xl2"))
    ]
    out = ["--out", folder / "out", "--uri", "none"]
    report = curves(capsys, *runs, *out, "--published", "--predict", "fitv2_3b2@2000000")
    assert report["metric"] == "loss" and report["mlflow"] is None
    truth = float(TRUTH(2_971_928_080, 2e6 * 256))
    (prediction,) = report["predictions"]
    assert prediction["value"] == pytest.approx(truth, rel=0.01)
    assert prediction["low"] < prediction["high"] and prediction["measured"] is None
    assert report["surface"]["fit"]["E"]["low"] < 0.45 < report["surface"]["fit"]["E"]["high"]
    ours = [row for row in report["fid"]["rows"] if row["ours"]]
    assert len(ours) == 4 and all(row["guidance"] == "evaluate/256x256_cfg1/fid" for row in ours)
    assert ours[0]["points"][-1] == {
        "step": 4e5,
        "flops": pytest.approx(ours[0]["points"][-1]["flops"]),
        "fid": pytest.approx(300 * 400**-0.4),
    }
    for row in report["surface"]["frontier"]:
        assert row["loss"] > 0.45
    pictures = [Image.open(file) for file in report["files"] if file.endswith(".png")]
    assert len(pictures) == 7 and all(p.size[0] == 1320 for p in pictures)
    assert {Path(f).name for f in report["files"]} >= {"curves.json", "curves.txt", "runs.csv"}
    assert (folder / "out" / "runs.csv").read_text().count("\n") == 5

    # Then somebody has measured it.
    big = make_run(folder / "runs" / "3b2", "3b2", np.geomspace(1000, 2_000_000, 500).astype(int)).url
    (scored,) = curves(capsys, big, *out)["scored"]
    assert scored["measured"] == pytest.approx(truth, rel=1e-3)
    assert scored["error"] == pytest.approx(prediction["value"] / scored["measured"] - 1)
    assert scored["inside"] == (prediction["low"] <= scored["measured"] <= prediction["high"])


def test_a_runs_own_law_predicts_it_where_there_is_no_other(capsys, folder):
    run = make_run(folder / "run", "b2", STEPS, noise=0.001).url
    report = curves(capsys, run, "--out", folder / "out", "--uri", "none", "--predict", "fitv2_b2@2000000")
    assert report["surface"] is None and "train another size" in report["why_no_surface"]
    (prediction,) = report["predictions"]
    assert prediction["by"] == "run"
    assert prediction["value"] == pytest.approx(float(TRUTH(parameters("b2"), 2e6 * BATCH)), rel=0.01)


def test_what_cannot_be_done_is_reported(capsys, folder):
    run = make_run(folder / "run", "b2", STEPS).url
    out = ("--out", folder / "out", "--uri", "none")
    assert "give runs, --experiment NAME, or --published" in refused(capsys, *out)
    assert "give runs or --experiment, not both" in refused(capsys, run, "--experiment", "x")
    assert "--experiment needs --uri, as in" in refused(capsys, "--experiment", "x")
    assert "is not a run" in refused(capsys, folder / "nothing")
    assert "give CONFIG@STEP" in refused(capsys, run, *out, "--predict", "fitv2_3b2")
    assert "cannot read the config 'configs/no.yaml'" in refused(capsys, run, *out, "--predict", "no@5")
    assert "fitv2_3b2@5 cannot be predicted: there are no three sizes" in refused(
        capsys, run, *out, "--predict", "fitv2_3b2@5"
    )
    empty = make_run(folder / "empty", "b2", [100], loss=np.array([np.nan])).url
    assert "has no committed loss yet" in refused(capsys, empty, *out)
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / "predictions.jsonl").write_text("nonsense\n")
    assert "has a line that is not a prediction" in refused(capsys, run, *out)


# ---- MLflow ----


def test_through_mlflow_and_back(capsys, folder):
    """Runs published to a real MLflow are read there as from their journals; the report becomes a run of its own, which
    the next call does not take for training."""
    mlflow = pytest.importorskip("mlflow")
    urls = [
        make_run(folder / "runs" / s, s, STEPS[::3], gpu_hours=STEPS[::3] / 50.0).url for s in ("s2", "b2", "l2", "xl2")
    ]
    for url in urls:
        assert main(["track", "sync", url]) == 0
    uri = f"sqlite:///{folder}/runs/mlflow.db"
    by_journal = curves(capsys, *urls, "--out", folder / "one", "--predict", "fitv2_3b2@2000000")
    assert by_journal["mlflow"]["uri"] == uri
    by_mlflow = curves(capsys, "--experiment", "fitv2", "--uri", uri, "--out", folder / "two")
    assert sorted(by_mlflow["runs"], key=lambda r: r["name"]) == sorted(by_journal["runs"], key=lambda r: r["name"])
    assert by_mlflow["surface"]["fit"]["E"]["value"] == pytest.approx(by_journal["surface"]["fit"]["E"]["value"])

    client = mlflow.MlflowClient(uri)
    run = client.get_run(by_journal["mlflow"]["run"])
    assert run.info.status == "FINISHED" and run.data.tags["fitv2.kind"] == "curves"
    assert run.data.metrics["surface/E"] == by_journal["surface"]["fit"]["E"]["value"]
    prediction = by_journal["predictions"][0]
    (point,) = client.get_metric_history(run.info.run_id, "prediction/fitv2_3b2/value")
    assert (point.value, point.step) == (prediction["value"], 2_000_000)
    kept = {Path(a.path).name for a in client.list_artifacts(run.info.run_id, "curves")}
    pictures = {"loss.png", "frontier.png", "families1.png"}
    assert kept == pictures | {"curves.json", "curves.txt", "runs.csv", "predictions.jsonl"}

    assert "has no training run yet" in refused(capsys, "--experiment", "other", "--uri", uri)
    said = refused(capsys, "--experiment", "fitv2", "--uri", "http://me:hidden@127.0.0.1:9")
    assert "cannot read the experiment fitv2 from MLflow" in said and "hidden" not in said
    said = refused(capsys, urls[0], "--out", folder / "three", "--uri", "http://127.0.0.1:9")
    assert "failed to store the report" in said and (folder / "three" / "curves.json").exists()
