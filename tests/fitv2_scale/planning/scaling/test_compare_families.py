"""What families need to the same loss or FID, of runs whose curves are known in closed form.

A family that learns f times as fast as another has its loss after f times fewer steps: L(step) = a + b·(f·step)^-c.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fitv2_scale.cli.__main__ import main
from fitv2_scale.model.counts import forward_flops
from fitv2_scale.planning.scaling.published_fid import MODELS
from fitv2_scale.planning.scaling.read_curves import from_journal
from tests.support.curve_runs import BATCH, make_run
from tests.support.tiny_networks import DIT, FIT

STEPS = np.geomspace(1000, 400_000, 400).astype(int)
DIT_B = DIT | {"depth": 12}
FIT_B = FIT | {"depth": 12}
SIT, DDPM = {"model": DIT_B}, {"objective": "ddpm"}


def losses(faster: float, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.4 + 6 * (faster * STEPS) ** -0.4) * np.exp(noise * rng.standard_normal(len(STEPS)))


def fids(faster: float, count: int = 6) -> np.ndarray:
    return 2000 * (faster * STEPS[-count:]) ** -0.35


@pytest.fixture
def make(tmp_path):
    def call(name: str, faster: float, changes: dict | None = None, noise: float = 0.0, seed: int = 0, **more) -> str:
        val_loss = losses(faster, noise, seed)
        return make_run(tmp_path / name, "b2", STEPS, changes=changes, val_loss=val_loss, **more).url

    return call


@pytest.fixture
def compared(capsys, tmp_path):
    """``compared(*words)``: the tables of families by metric, all of the report, and the text."""

    def call(*words: str) -> tuple[dict[str, dict], dict, str]:
        capsys.readouterr()
        assert main(["curves", *words, "--out", str(tmp_path / "out"), "--uri", "none", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        return {t["metric"]: t for t in report["families"]}, report, (tmp_path / "out" / "curves.txt").read_text()

    return call


def rows_of(table: dict) -> dict[str, dict]:
    return {row["name"]: row for row in table["rows"]}


def test_a_family_that_learns_two_and_a_half_times_as_fast(make, compared):
    """Without noise: the exact step, and all axes."""
    costs = {"flops": STEPS * 3e12, "gpu_hours": STEPS / 500.0}
    slow = make("sit", 1.0, SIT, images=STEPS * 300.0, flops=STEPS * 1e12, gpu_hours=STEPS / 1000.0)
    tables, report, text = compared(make("ours", 2.5, images=STEPS * 256.0, **costs), slow, "--baseline", "SiT")
    table = tables["val_loss"]
    ours, sit = (rows_of(table)[name] for name in ("FiTv2-B/2", "SiT-B/2"))
    assert table["baseline"] == "SiT-B/2" and [r["network"] for r in report["runs"]] == ["FiTv2-B/2", "SiT-B/2"]
    at = ((table["target"] - 0.4) / 6) ** (-1 / 0.4)  # closed form
    assert sit["needed"]["steps"] == pytest.approx(at, rel=0.002)
    assert ours["needed"] == {
        "steps": pytest.approx(at / 2.5, rel=0.002),
        "images": pytest.approx(at / 2.5 * 256, rel=0.002),
        "flops": pytest.approx(at / 2.5 * 3e12, rel=0.002),
        "gpu_hours": pytest.approx(at / 2.5 / 500, rel=0.002),
    }
    expected = {"steps": 0.4, "images": 0.4 * 256 / 300, "flops": 0.4 * 3, "gpu_hours": 0.4 * 2}
    assert {axis: ratio["value"] for axis, ratio in ours["ratios"].items()} == pytest.approx(expected, rel=0.002)
    assert all(ratio is None for ratio in sit["ratios"].values())
    assert "val_loss: to 0.4" in text and "as ratios to SiT-B/2" in text
    assert Image.open(next(f for f in report["files"] if f.endswith("families1.png"))).size == (1320, 960)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_interval_has_the_truth(make, compared, seed):
    runs = make("ours", 2.5, noise=0.004, seed=seed), make("sit", 1.0, SIT, noise=0.004, seed=100 + seed)
    tables, _, text = compared(*runs, "--baseline", "SiT")
    ours = rows_of(tables["val_loss"])["FiTv2-B/2"]
    ratio = ours["ratios"]["steps"]
    assert ratio["low"] < 0.4 < ratio["high"] and 0.02 < ratio["high"] / ratio["low"] - 1 < 0.6
    of_images = ours["ratios"]["images"]  # the batches are the same
    assert (of_images["low"], of_images["high"]) == pytest.approx((ratio["low"], ratio["high"]))
    assert ours["note"] == "interval of points around a fit: one run of FiTv2-B/2 and of SiT-B/2"
    assert ours["note"] in text and f"({ratio['low']:.4g} to {ratio['high']:.4g})" in text


def test_repeats_are_one_row_and_widen_the_interval(make, compared):
    """Seeds that differ by a tenth in how fast they learn."""
    ours = [make(f"ours{i}", faster, {"seed": i}, 1e-4, i) for i, faster in enumerate((2.25, 2.75))]
    sit = [make(f"sit{i}", faster, SIT | {"seed": i}, 1e-4, 9 + i) for i, faster in enumerate((0.9, 1.1))]
    tables, _, _ = compared(*ours, *sit, "--baseline", "SiT-B/2")
    row = rows_of(tables["val_loss"])["FiTv2-B/2"]
    assert row["runs"] == 2 and row["note"] == "interval over runs"
    truth = ((0.9 * 1.1) / (2.25 * 2.75)) ** 0.5  # the geometric mean
    ratio = row["ratios"]["steps"]
    assert ratio["value"] == pytest.approx(truth, rel=0.02)
    assert ratio["low"] < 0.95 * truth and 1.05 * truth < ratio["high"]


def test_what_is_not_reached_is_not_extrapolated(make, compared):
    tables, _, text = compared(make("ours", 2.5), make("sit", 1.0, SIT))  # the baseline is the first
    table = tables["val_loss"]
    sit = rows_of(table)["SiT-B/2"]
    assert table["baseline"] == "FiTv2-B/2" and not sit["reached"]
    assert set(sit["needed"].values()) == set(sit["ratios"].values()) == {None}
    assert f"not reached by step {sit['last']:,.0f}" in text and 350_000 < sit["last"] <= 400_000


def test_losses_are_compared_within_an_objective_and_fids_between_them(make, compared):
    runs = [
        make("ours", 2.5, fid=fids(2.5)), make("sit", 1.0, SIT, fid=fids(1.0)),
        make("dit", 0.5, SIT | DDPM, fid=fids(0.5)), make("fit", 1.25, {"model": FIT_B} | DDPM, fid=fids(1.25)),
    ]  # fmt: skip
    tables, _, text = compared(*runs)
    assert {metric: list(rows_of(table)) for metric, table in tables.items()} == {
        "val_loss of flow": ["FiTv2-B/2", "SiT-B/2"],
        "val_loss of ddpm": ["DiT-B/2", "FiT-B/2"],
        "evaluate/256x256_cfg1/fid": ["FiTv2-B/2", "SiT-B/2", "DiT-B/2", "FiT-B/2"],
    }
    assert text.count("Losses of different objectives measure different things") == 1
    tables, _, _ = compared(*runs, "--baseline", "DiT-B/2", "--target", str(2000 * 195_000.0**-0.35))
    assert list(tables) == ["val_loss of ddpm", "evaluate/256x256_cfg1/fid"]
    fit = rows_of(tables["val_loss of ddpm"])["FiT-B/2"]
    assert fit["ratios"]["steps"]["value"] == pytest.approx(0.4, rel=0.002)
    sit, dit = (rows_of(tables["evaluate/256x256_cfg1/fid"])[name] for name in ("SiT-B/2", "DiT-B/2"))
    assert dit["needed"]["steps"] == pytest.approx(390_000, rel=1e-6)  # a power law: exact in its logarithms
    assert sit["at_most"] and sit["needed"]["steps"] == pytest.approx(STEPS[-6])


def test_losses_on_other_data_are_left_out(make, compared):
    runs = make("ours", 2.5), make("sit", 1.0, SIT), make("crop", 1.0, {"model": DIT_B, "data": {"views": "crop"}})
    (table,) = compared(*runs)[0].values()
    (sentence,) = table["left_out"]
    assert "is not compared with FiTv2-B/2 by val_loss: they differ in data.views: mixed and crop" in sentence
    assert from_journal(runs[1]).name in rows_of(table).popitem()[0]  # two SiT-B/2 are told apart by their runs


@pytest.mark.parametrize("cfg, target", [("1", 26.08), ("1.5", 9.23)])
def test_the_papers_table(compared, cfg, target):
    """FiTv2-B/2 is at 400K steps where FiT-B/2 is at 1,500K; with guidance it takes a little more."""
    tables, report, text = compared("--published")
    table = tables[f"FID-50000 at 256x256, guidance {cfg}"]
    rows = {name.partition(",")[0]: row for name, row in rows_of(table).items()}
    assert table["baseline"] == "FiT-B/2, published" and table["target"] == pytest.approx(target)
    assert rows["FiT-B/2"]["needed"]["steps"] == pytest.approx(1_500_000)
    assert not rows["DiT-B/2"]["reached"] and rows["SiT-B/2"]["last"] == 1_000_000
    ours = rows["FiTv2-B/2"]
    between = np.log(9.45 / 9.23) / np.log(9.45 / 5.51)  # of 400K and 1,000K, in their logarithms
    steps = 400_000 * 2.5 ** (between if cfg == "1.5" else 0)
    assert ours["needed"]["steps"] == pytest.approx(steps) and ours["at_most"] == (cfg == "1")
    assert ours["ratios"]["steps"]["value"] == pytest.approx(steps / 1_500_000)
    a_step = [forward_flops(MODELS[name], 256) for name in ("FiTv2-B/2", "FiT-B/2")]
    assert ours["ratios"]["flops"]["value"] == pytest.approx(steps / 1_500_000 * a_step[0] / a_step[1])
    assert ours["needed"]["images"] == pytest.approx(steps * BATCH) and ours["needed"]["gpu_hours"] is None
    assert "at most 400,000" in text and "not reached by step 1,000,000" in text
    assert {"families1.png", "families2.png"} <= {Path(file).name for file in report["files"]}


def test_a_run_beside_the_papers_points_and_a_baseline_that_starts_below(make, compared):
    """A run's FID is beside the paper's by images, size and guidance, whatever its solver."""
    label = "evaluate/256x256-cfg1-euler250-none-50000/fid"
    run = make("ours", 1.0, **{label: np.linspace(90, 20, len(STEPS))})
    tables, _, _ = compared(run, "--published", "--target", "50")
    rows = rows_of(tables["FID-50000 at 256x256, guidance 1"])
    assert list(rows)[0] == "FiTv2-B/2" and len(rows) == 5 and rows["FiTv2-B/2"]["needed"]["steps"]
    assert rows["FiTv2-B/2"]["note"] == "no ratio: FiT-B/2, published is below the target at its first point"
    assert rows["FiTv2-B/2"]["ratios"]["steps"] is None


def test_a_baseline_that_is_in_no_table(make, capsys, tmp_path):
    runs = [make("ours", 2.5), make("sit", 1.0, SIT)]
    assert main(["curves", *runs, "--out", str(tmp_path / "out"), "--uri", "none", "--baseline", "DiT"]) == 2
    said = "--baseline DiT: no table has this row beside another; rows are FiTv2-B/2, SiT-B/2"
    assert said in capsys.readouterr().err
    assert main(["curves", *runs, "--published", "--uri", "none", "--baseline", "FiTv2"]) == 2
    assert "--baseline FiTv2: this is FiTv2-B/2, published; FiTv2-XL/2, published" in capsys.readouterr().err
