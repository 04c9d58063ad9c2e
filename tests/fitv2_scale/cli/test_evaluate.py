"""`fitv2 evaluate`: suites, numbers of steps, MLflow, bad input."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fitv2_scale.cli.__main__ import main
from tests.support.evaluations import network_options
from tests.support.feature_networks import POOL
from tests.support.tiny_runs import CLASSES


def test_figures_reach_mlflow_at_their_step(two_step_run, feature_network, reference, tmp_path, capfd):
    """And leave the run's status alone; sent again, they are there once."""
    from mlflow import MlflowClient

    copy = str(tmp_path / "tracked" / "run")
    shutil.copytree(two_step_run, copy, ignore=shutil.ignore_patterns("evaluations"))
    start = Path(copy, "attempts/1/start.json")
    tracking = {"uri": "auto", "experiment": "tests"}
    start.write_text(json.dumps(json.loads(start.read_text()) | {"tracking": tracking}))
    call = ["evaluate", copy, *network_options(feature_network), "--reference", reference]
    call += ["--size", "32x48", "--images", "30", "--nfe", "1"]
    assert main(call) == 0 and "MLflow does not know the run yet" in capfd.readouterr().out
    assert main(["track", "sync", copy]) == 0
    client = MlflowClient(f"sqlite:///{tmp_path}/tracked/mlflow.db")
    found = client.get_run(json.loads(Path(copy, "tracking/mlflow.json").read_text())["mlflow_run"])
    for _ in range(2):
        assert main(call) == 0 and "MLflow: 5 metrics in run" in capfd.readouterr().out
    step = json.loads(Path(copy, "evaluations/2.json").read_text())
    for name in ("fid", "recall"):
        (sent,) = client.get_metric_history(found.info.run_id, f"evaluate/32x48-cfg1.5-euler1-none-30/{name}")
        assert (sent.step, sent.value) == (2, step[name])
    assert client.get_run(found.info.run_id).info.status == found.info.status


def test_the_command_with_a_suite_and_with_few_steps(two_step_run, feature_network, reference, tmp_path, capfd):
    suite = tmp_path / "small.yaml"
    suite.write_text(
        "title: Small\nimages: 30\nsampling: {solver: heun, steps: 2}\ncells:\n  - {size: 32x48, rope: vision_ntk}\n"
        "  - {size: 48x32, cfg: 1.0}\npublished:\n  - {model: Other, seen: 5M, 32x48: [1, 2, null, 0.5, 0.25]}\n"
    )
    references = tmp_path / "references"
    references.mkdir()
    for size in ("32x48", "48x32"):
        (references / f"{size}.npz").write_bytes(Path(reference).read_bytes())
    common = ["evaluate", two_step_run, *network_options(feature_network), "--out", str(tmp_path / "out")]
    assert main([*common, "--suite", str(suite), "--reference", str(references), "--json"]) == 0
    first, second = json.loads(capfd.readouterr().out)
    assert (first["size"], first["cfg"], first["nfe"], first["rope"]) == ("32x48", 1.5, 4, "vision_ntk")
    assert (second["size"], second["cfg"], second["nfe"], second["rope"]) == ("48x32", 1.0, 4, "none")
    assert first["reference"]["source"].endswith("32x48.npz") and second["reference"]["source"].endswith("48x32.npz")
    table = (tmp_path / "out/evaluations/2/small.md").read_text()
    assert "| Other" in table and "| 5M" in table and f"{second['fid']:.2f}" in table.split("## 48x32")[1]

    few = ["--size", "32x48", "--size", "48x32", "--images", "30", "--nfe", "2,6", "--solver", "heun"]
    assert main([*common, *few, "--reference", reference]) == 0
    text = capfd.readouterr().out
    line = f"the images of {reference} are 32x48, those measured are 48x32"
    assert text.count(", those measured are") == text.count(line) == 1
    assert "NFE 2" in text and "NFE 6" in text and "nfe.png: FID against NFE" in text
    assert Image.open(tmp_path / "out/evaluations/2/nfe.png").size > (300, 200)


@pytest.mark.parametrize(
    "words,sentence",
    [
        (["RUN", "NETWORK", "REFERENCE", "--size", "100x100"], "size '100x100': give HEIGHTxWIDTH in pixels"),
        (["RUN", "NETWORK", "REFERENCE", "--size", "32x48", "--images", "12"], "12 images are too few for a"),
        (["RUN", "NETWORK", "REFERENCE", "--size", "32x48", "--classes", "0,9"],
         f"--classes 0,9: give numbers from 0 to {CLASSES - 1}, separated by commas"),
        (["RUN", "NETWORK", "REFERENCE", "--nfe", "5", "--solver", "heun"], "--nfe 5: give even numbers as in 4,8,50"),
        (["RUN", "NETWORK", "REFERENCE", "--nfe", "5", "--solver", "dopri5"], "--nfe needs a solver of fixed steps"),
        (["RUN", "NETWORK", "REFERENCE", "--suite", "none"], "there is no suite none: .*hr, in1k256, ood"),
        (["RUN", "NETWORK", "REFERENCE", "--suite", "hr", "--size", "32x48"], "leave --size out"),
        (["RUN", "NETWORK", "--size", "32x48"], "give the images to compare with as --reference"),
        (["RUN", "REFERENCE", "--size", "32x48"], "give the network .* as --network"),
        (["RUN", "NETWORK", "REFERENCE", "--suite", "configs/demo.yaml"], "demo.yaml is not a suite: it has no cells"),
        (["/no/run@7", "NETWORK", "REFERENCE", "--size", "32x48"], "/no/run is not a run"),
        (["RUN@7", "NETWORK", "REFERENCE", "--size", "32x48"], "has no commit at step 7"),
        (["RUN", "NETWORK", "--reference", "/no/ref.npz", "--size", "32x48"], "cannot read the reference /no/ref.npz"),
        (["RUN", "NETWORK", "--reference", "SMALL", "--size", "32x48"], "the network gives 12 features, but .* has 5"),
        (["RUN", "NETWORK", "--reference", "OTHER", "--size", "32x48"], "is of the network 00000"),
        (["PHOTOGRAPHS", "NETWORK", "REFERENCE"], "images of many sizes: give the size to measure at as --size"),
        (["PHOTOGRAPHS", "REFERENCE", "--size", "32x48"], "holds images: give the network"),
        (["PHOTOGRAPHS", "REFERENCE", "--size", "32x48", "--network", "TINY"], "give its digest as --network-sha256"),
        (["PHOTOGRAPHS", "REFERENCE", "--size", "32x48", "--network", "TINY", "--network-sha256", "ab"],
         "has the sha256 .* not ab"),
        (["NAN", "REFERENCE"], "pool features: row 3 holds NaN or infinity"),
        (["FEW", "REFERENCE"], "9 images are too few for a covariance of 12 pool features: give at least 13"),
        (["/no/such/pictures", "NETWORK", "REFERENCE", "--size", "32x48"], "there is nothing at /no/such/pictures"),
        (["SMALL", "NETWORK", "REFERENCE"], "arr_0 is missing, not uint8"),
        (["BATCH", "NETWORK", "REFERENCE", "--size", "32x32"], "images of 32x48, .*not resized: leave out --size"),
        (["RUN", "NETWORK", "REFERENCE", "--save-statistics", "s.npz"], "--save-statistics needs images: make some"),
        (["RUN", "NETWORK", "REFERENCE", "--nfe", "5", "--steps", "5"], "--nfe gives the numbers of steps: leave out"),
        (["RUN", "NETWORK", "REFERENCE", "--size", "32x48", "--images", "12", "model.heads=1"], "another network"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    words, sentence, two_step_run, feature_network, reference, photographs, tmp_path, capfd
):
    pool = np.random.default_rng(0).normal(size=(40, POOL)).astype(np.float32)
    files = {name: str(tmp_path / f"{name}.npz") for name in ("SMALL", "OTHER", "NAN", "FEW", "BATCH")}
    np.savez(files["SMALL"], mu=np.zeros(5), sigma=np.eye(5))
    np.savez(files["OTHER"], mu=np.zeros(POOL), sigma=np.eye(POOL), network=np.array("00" * 32))
    np.savez(files["NAN"], pool=np.where(np.arange(40)[:, None] == 3, np.nan, pool))
    np.savez(files["FEW"], pool=pool[:9])
    np.savez(files["BATCH"], arr_0=np.zeros((20, 32, 48, 3), np.uint8))
    single = files | {
        "RUN": two_step_run,
        "RUN@7": f"{two_step_run}@7",
        "PHOTOGRAPHS": photographs,
        "TINY": feature_network["network"],
    }
    many = {"NETWORK": network_options(feature_network), "REFERENCE": ["--reference", reference]}
    given = [word for name in words for word in many.get(name, [single.get(name, name)])]
    before = sorted(Path(two_step_run).rglob("*"))
    assert main(["evaluate", *given]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fitv2: ")]
    assert len(lines) == 1
    assert re.search(sentence, lines[0]), lines[0]
    assert sorted(Path(two_step_run).rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [
        *(["--images", "9"], ["--out", "o"], ["--suite", "hr"], ["--nfe", "5"], ["--classes", "1"], ["--cfg", "1"]),
        *(["--config", "c.yaml"], ["--seed", "0"], ["--keep-features"], ["--guided-channels", "all"]),
        *(["--solver", "heun"], ["--steps", "3"], ["--rope", "ntk"], ["--attention-scale", "none"], ["model.depth=2"]),
    ],
)
def test_what_only_makes_images_is_refused_for_images_that_exist(words, photographs, reference, capfd):
    assert main(["evaluate", photographs, "--reference", reference, "--size", "32x48", *words]) == 2
    sentence = f"images that exist already are measured as they are: leave out {words[0]}"
    assert capfd.readouterr().err == f"fitv2: {sentence}\n"


def test_figures_of_a_part_of_the_images_end_with_2(photographs, feature_network, tmp_path, capfd):
    shutil.copytree(photographs, tmp_path / "some")
    broken = next((tmp_path / "some").rglob("*.jpg"), None) or next((tmp_path / "some").rglob("*.png"))
    broken.write_bytes(b"")
    (tmp_path / "some" / "notes.txt").touch()
    words = [str(tmp_path / "some"), *network_options(feature_network), "--reference", photographs, "--size", "32x48"]
    assert main(["evaluate", *words]) == 2
    said = capfd.readouterr()
    assert "files seen: 81 (" in said.out and "left aside: .txt 1\n" in said.out
    assert f"{photographs}, the reference:\n  files seen: 80 (" in said.out
    assert "1 of the images cannot be read and were left out of these figures" in said.err and "fid " in said.out
