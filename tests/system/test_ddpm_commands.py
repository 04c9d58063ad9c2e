"""A run of a DDPM, from pictures during training to its metrics: each command samples with a solver that fits."""

import contextlib
import io
import json
import re

import pytest
from PIL import Image

from fitv2_scale.cli.__main__ import main
from fitv2_scale.run.run import Run
from fitv2_scale.tracking.journal import read
from fitv2_scale.train.loop import train
from tests.support.evaluations import network_options
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import make_tiny


@pytest.fixture(scope="module")
def ddpm_run(dataset, tmp_path_factory) -> str:
    """Two steps on two ranks, with pictures and a validation at the end. The network learns the variance, too."""
    config = make_tiny(
        dataset,
        tmp_path_factory.mktemp("ddpm"),
        objective="ddpm",
        model__outputs=2,
        train__steps=2,
        ema__decay=0.1,
        sampling={"every_steps": 2, "sizes": ["32x48"], "columns": 2, "solver": "ddpm", "steps": 3},
        validation={"every_steps": 2, "url": dataset, "images": 20, "timesteps": 3},
    )
    assert run_ranks(2, train, config) == [0, 0]
    return config.run


def reported(*words: str) -> dict | list:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*words, "--json"]) == 0
    return json.loads(out.getvalue())


def refused(*words: str) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main([*words]) == 2
    (line,) = said.getvalue().splitlines()
    return line


def test_pictures_during_training(ddpm_run):
    (picture,) = Run.open(ddpm_run).store.list("samples/")
    assert Image.open(io.BytesIO(Run.open(ddpm_run).store.read(picture))).size == (4 + 2 * (48 + 4), 4 + 32 + 4)


def test_sampled_by_any_solver_of_a_ddpm(ddpm_run, tmp_path):
    out = str(tmp_path / "grid.png")
    common = ["sample", ddpm_run, "--size", "32x48", "--size", "16x16", "--columns", "2", "--out", out]
    pictures = []
    for words, solver, nfe in (
        ([], "ddpm", 3),
        (["--solver", "ddim", "--steps", "4"], "ddim", 4),
        (["--solver", "ddim", "--steps", "4", "sampling.guidance_interval=[0.4,0.6]"], "ddim", 4),
        (["--guided-channels", "three", "--cfg", "4"], "ddpm", 3),
    ):
        report = reported(*common, *words)
        assert (report["solver"], report["nfe"]) == (solver, nfe)
        with open(out, "rb") as file:
            pictures.append(file.read())
    assert pictures[0] != pictures[1]


def test_validated_as_during_training(ddpm_run):
    (during,) = [r.metrics["val_loss_ema"] for r in read(Run.open(ddpm_run)) if r.metrics and "val_loss" in r.metrics]
    assert reported("validate", ddpm_run)["val_loss_ema"] == pytest.approx(during, rel=1e-5)


def test_measured_with_few_steps(ddpm_run, feature_network, reference, tmp_path):
    call = ["evaluate", ddpm_run, *network_options(feature_network), "--reference", reference, "--size", "32x48"]
    call += ["--images", "30", "--out", str(tmp_path)]
    few = reported(*call, "--nfe", "2,5")
    assert [(r["solver"], r["steps"], r["nfe"]) for r in few] == [("ddim", 2, 2), ("ddim", 5, 5)]
    assert few[0]["fid"] != few[1]["fid"] and "guidance_interval" not in few[0]
    (limited,) = reported(*call, "--steps", "2", "sampling.guidance_interval=[0.4,1]")
    assert (limited["solver"], limited["guidance_interval"]) == ("ddpm", [0.4, 1])
    assert limited["label"] == "32x48-cfg1.5from0.4to1-ddpm2-none-30"
    stored = json.loads((tmp_path / "evaluations" / "2.json").read_text())
    assert sorted(cell["solver"] for cell in stored["cells"]) == ["ddim", "ddim", "ddpm"]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["sample", "RUN", "--solver", "euler"], "sampling.solver is euler, .* use ddpm or ddim$"),
        (["sample", "RUN", "--solver", "ddim", "--steps", "7"], "steps is 7, and ddim .*divisor of 1000"),
        (["sample", "RUN", "objective=flow", "sampling.every_steps=0"], "was trained with objective=ddpm: leave out"),
        (["evaluate", "RUN", "OPTIONS", "--solver", "sde"], "sampling.solver is sde, .* use ddpm or ddim$"),
        (["evaluate", "RUN", "OPTIONS", "--suite", "in1k256"], "sampling.solver is dopri5, .* use ddpm or ddim$"),
        (["evaluate", "RUN", "OPTIONS", "--nfe", "5", "--solver", "euler"], "fixed steps: ddpm or ddim, not euler$"),
    ],
)
def test_what_does_not_fit_is_one_sentence(ddpm_run, feature_network, reference, words, sentence):
    options = [*network_options(feature_network), "--reference", reference]
    words = [word for each in words for word in (options if each == "OPTIONS" else [each])]
    assert re.search(sentence, refused(*(ddpm_run if word == "RUN" else word for word in words)))
