"""The words beside the figures of a plan."""

import json

import pytest

from fitv2_scale.cli.__main__ import main
from fitv2_scale.planning.forecast.words import counted, duration, small
from tests.support.repository import ROOT

DEMO = ["plan", str(ROOT / "configs/demo.yaml"), "data.url=preset:imagenet256", "model.classes=1000"]


def test_one_and_many():
    assert [counted(n, "rank") for n in (0, 1, 2, 1024)] == ["0 ranks", "1 rank", "2 ranks", "1,024 ranks"]
    assert [small(x) for x in (0.0804, 9.96, 10, 1196.4)] == ["0.08", "10", "10", "1,196"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.18, "0.18 seconds"),
        (1, "1 second"),
        (59, "59 seconds"),
        (60, "1 minute"),
        (289.2, "4.82 minutes"),
        (1800, "30 minutes"),
        (3600, "1 hour"),
        (38_160, "10.6 hours"),
        (86_400, "1 day"),
        (4_112_640, "47.6 days"),
        (float("inf"), "inf days"),
    ],
)
def test_a_duration(seconds, text):
    assert duration(seconds) == text


def test_a_run_that_is_shorter_than_the_best_interval(capsys):
    """Ten commits by its config, each 100 of 1,000 steps; one GPU starts once (222 s) and waits for the save at the end
    (67 s), beside which its 0.18 s of steps are nothing."""
    assert main([*DEMO, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["storage"]["commits_made"] == 10 and report["storage"]["commits_kept"] == 2
    seconds = 1000 * report["time"]["seconds_a_step"]
    assert seconds < 1 and report["time"]["days"] * 86400 == pytest.approx(222 + 67 + seconds, abs=0.01)
    good = report["goodput"]
    assert good["expected"] == pytest.approx(seconds / (289 + seconds), rel=1e-3)
    assert good["simulated"]["mean"] == pytest.approx(good["expected"], rel=1e-3)
    assert main(DEMO) == 0
    text = capsys.readouterr().out
    for words in (
        "layout   1 rank, fsdp",
        "commits  best is one save at the end: the run is no longer than the best interval, 30 minutes",
        "the run makes 10 and keeps 2",
        "time     4.82 minutes, 0.08 GPU-hours",
        "1 node (1 GPU): ",
        "         1 node  ",
        "0 with a failure; with",
        "not in this time: layout.precision=fp32; `fitv2 bench step CONFIG --json` measures that",
    ):
        assert words in text
    assert "1 ranks" not in text and "1 nodes" not in text and "1 GPUs" not in text


def test_a_longer_run_saves_at_intervals(capsys):
    """60,000,000 steps of 0.18 ms are three hours."""
    assert main([*DEMO, "train.steps=60_000_000", "checkpoint.every_minutes=20", "layout.precision=bf16"]) == 0
    text = capsys.readouterr().out
    assert "commits  best every 30 minutes (9,989,505 steps): checkpoint.every_minutes=30" in text
    assert "the run makes 10 and keeps 2" in text and "not in this time" not in text
