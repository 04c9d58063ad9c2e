"""What the words of a command line become."""

import json

import pytest

from fitv2_scale.cli import __main__
from fitv2_scale.cli.__main__ import main
from tests.support.repository import ROOT


def test_assumptions_that_are_given_are_in_the_plan(dataset, capsys):
    words = ["--mfu", "0.4", "--network", "25", "--failures", "0.01", "--detect", "60", "--restart", "120"]
    data = [f"data.url={dataset}", "model.classes=5", "batch.images=12"]
    assert main(["plan", str(ROOT / "configs/demo.yaml"), *data, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["assumed"]
    given = {"mfu": 0.4, "network": 25e9, "failures_per_node_day": 0.01, "detect_seconds": 60, "restart_seconds": 120}
    assert {name: found[name]["value"] for name in given} == given


@pytest.mark.parametrize(
    "words,said",
    [
        (["shard", "write", "SRC", "DST", "--latent", "median"], "invalid choice: 'median'"),
        (["plan", "configs/demo.yaml", "--mfu", "much"], "invalid float value: 'much'"),
        (["nosuch"], "invalid choice: 'nosuch'"),
    ],
)
def test_a_word_that_is_none_of_the_choices_is_refused(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words,told",
    [
        (["train", "configs/demo.yaml", "--nosuch"], True),
        (["sample", "runs/a", "--steps", "many"], True),
        (["status", "runs/a", "--nosuch"], False),
        (["plan", "configs/demo.yaml", "--mfu", "much"], False),
    ],
)
def test_ranks_that_join_hear_of_a_wrong_word(words, told, monkeypatch, capsys):
    heard = []
    monkeypatch.setattr(__main__, "become_a_rank", lambda: None)
    monkeypatch.setattr(__main__, "tell_ranks", lambda error: heard.append(str(error)))
    with pytest.raises(SystemExit):
        main(words)
    said = capsys.readouterr().err.splitlines()[-1].partition(" error: ")[2]
    assert [one.partition(": ")[2] for one in heard] == told * [said]


def test_several_loaders_can_be_compared_with(capsys):
    assert main(["bench", "data", "--against", "files", "nosuch"]) == 2
    assert "nosuch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words,said",
    [
        (["--s3", "bucket/folder", "--saves", "0"], "--s3 bucket/folder: give s3://BUCKET/FOLDER"),
        (["--s3", "s3://bucket/folder", "--saves", "0"], "--saves 0: give at least 1"),
    ],
)
def test_a_bench_of_saves_that_cannot_be_made_is_refused(words, said, capsys):
    assert main(["bench", "checkpoint", str(ROOT / "configs/demo.yaml"), *words]) == 2
    assert capsys.readouterr().err == f"fitv2: {said}\n"
