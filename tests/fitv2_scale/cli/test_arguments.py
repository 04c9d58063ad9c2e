"""What the words of a command line become."""

import json

import pytest

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


def test_several_loaders_can_be_compared_with(capsys):
    assert main(["bench", "data", "--against", "files", "nosuch"]) == 2
    assert "nosuch" in capsys.readouterr().err
