"""`fitv2 evaluate --suite`: a run of a published network is sampled as its row was, any other as the suite says."""

import json
from pathlib import Path

import pytest
import yaml

from fitv2_scale.cli.__main__ import main
from fitv2_scale.train.loop import DONE, train
from tests.support.evaluations import network_options
from tests.support.tiny_runs import make_tiny

SUITE = """title: Small
images: 30
sampling: {solver: dopri5, rope: vision_ntk, cfg: 2}
cells: [{size: 32x32}, {size: 32x48}]
published:
  - {model: DiT-tiny, config: CONFIG, sampling: {solver: ddpm, steps: 2, cfg: 1.25}, 32x48: [1, 2, 3, 0.5, 0.5]}
"""


@pytest.fixture(scope="module")
def dit(dataset, tmp_path_factory):
    """The config of a run with a commit at step 1: a DDPM with a table of positions of 2 x 2 tokens."""
    switches = {"position": "sincos", "mlp": "gelu", "adaln": "full", "qk_norm": "none", "outputs": 2}
    model = {"depth": 2, "hidden": 32, "heads": 2, "classes": 5, "sincos": {"train_side": 2}} | switches
    folder = tmp_path_factory.mktemp("dit")
    config = make_tiny(dataset, folder, model=model, objective="ddpm", train__steps=1, ema__decay=0.1)
    assert train(config) == DONE
    return config


def suite_of(config, folder: Path, **changes) -> str:
    """A suite whose row is of the network of ``config``, with changes to its model."""
    tree = config.model_dump(mode="json")
    tree["model"] |= changes
    (folder / "network.yaml").write_text(yaml.safe_dump(tree))
    (folder / "small.yaml").write_text(SUITE.replace("CONFIG", str(folder / "network.yaml")))
    return str(folder / "small.yaml")


def test_a_network_of_a_row_is_sampled_as_that_row(dit, feature_network, reference, tmp_path, capfd):
    """In its own way over a solver and guidance that it could not have, at other sizes with PI and EI."""
    call = ["evaluate", dit.run, *network_options(feature_network), "--reference", reference]
    call += ["--out", str(tmp_path / "out"), "--suite", suite_of(dit, tmp_path)]
    assert main([*call, "--json"]) == 0
    results = json.loads(capfd.readouterr().out)
    found = [(r["size"], r.get("sincos"), r["solver"], r["steps"], r["cfg"], r["nfe"], r["rope"]) for r in results]
    expected = [("32x32", None), ("32x48", "pi"), ("32x48", "ei")]
    assert found == [(*each, "ddpm", 2, 1.25, 2, "none") for each in expected]
    assert results[1]["fid"] != results[2]["fid"]
    table = (tmp_path / "out/evaluations/1/small.md").read_text()
    _, square, wide = table.split("\n## ")
    assert wide.count("**ours**") == 2 and "NFE 2, sincos pi" in wide and "NFE 2, sincos ei" in wide
    assert square.count("**ours**") == 1 and "NFE 2, rope none" in square

    assert main([*call, "--cfg", "1", "--solver", "ddim", "--json"]) == 0  # options go before
    results = json.loads(capfd.readouterr().out)
    assert {(r["solver"], r["cfg"], r["steps"]) for r in results} == {("ddim", 1, 2)}


def test_another_network_is_sampled_as_the_suite_says(dit, two_step_run, feature_network, reference, tmp_path, capfd):
    common = [*network_options(feature_network), "--reference", reference, "--out", str(tmp_path / "out")]
    suite = suite_of(dit, tmp_path, classes=6)
    assert main(["evaluate", dit.run, *common, "--suite", suite]) == 2
    assert "sampling.solver is dopri5, which is for objective=flow" in capfd.readouterr().err
    assert main(["evaluate", two_step_run, *common, "--suite", suite, "--json"]) == 0
    results = json.loads(capfd.readouterr().out)
    assert [(r["size"], r["solver"], r["cfg"], r["rope"]) for r in results] == [
        (size, "dopri5", 2, "vision_ntk") for size in ("32x32", "32x48")
    ]
    assert main(["evaluate", dit.run, *common, "--size", "32x48", "--rope", "ntk"]) == 2
    assert capfd.readouterr().err == "fitv2: this network has model.position=sincos: leave out --rope\n"
    size = ["--size", "160x320", "--images", "20", "--solver", "ddim", "--steps", "2"]  # RoPE has VisionNTK there
    assert main(["evaluate", dit.run, *common, *size, "--json"]) == 0
    (result,) = json.loads(capfd.readouterr().out)
    assert (result["rope"], result["attention_scale"]) == ("none", "none")


def test_a_suite_is_listed_without_weights(capfd):
    assert main(["evaluate", "--suite", "in1k256", "--list", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    assert {each["config"] for each in listed} == {"dit_xl2", "sit_xl2", "fit_xl2", "fitv2_xl2", "fitv2_3b2"}
    assert len(listed) == 5 + 5 + 3 + 3 + 3
    assert listed[1]["sampling"] == {
        "cfg": 1.5,
        "solver": "ddpm",
        "steps": 250,
        "guided_channels": "three",
        "rope": "none",
        "attention_scale": "none",
        "sincos": "pi",
    }
    assert main(["evaluate", "--suite", "hr", "--list"]) == 0
    text = capfd.readouterr().out
    assert text.startswith("ImageNet, sizes of 1,024 tokens or less (FiTv2, Tab. VI); 50,000 images a cell\n")
    assert "\nfitv2_xl2_hr  flow       512x512  cfg=1.65 solver=dopri5" in text


@pytest.mark.parametrize(
    "words,sentence",
    [
        (["--list"], "--list shows what is in a suite: give it as --suite NAME"),
        (["RUN", "--suite", "hr", "--list"], "measures nothing: leave out RUN"),
        (["--suite", "hr", "--list", "--size", "32x32", "--cfg", "2"], "measures nothing: leave out --size, --cfg"),
        (["--suite", "hr"], "give WHAT to evaluate: RUN, RUN@STEP, a weights file, images or features"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, capfd):
    assert main(["evaluate", *words]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fitv2: ") and sentence in line
