"""A dataset and a run that commit a2e80d5 wrote still open, verify, sample, and train on as they did then.

The files, and the figures that the code of then gave, are in fixtures/made_by_a2e80d5 (its README says how they came
about). The numbers of this test are theirs, never those of the code under test.
"""

import contextlib
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_sharding.errors import UserError
from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.load import load_config
from fitv2_scale.config.schema import Config
from fitv2_scale.run.run import Run
from fitv2_scale.tracking.journal import read
from fitv2_scale.train.loop import train
from tests.support.ranks import run_ranks
from tests.support.run_history import losses, trained

OLD = Path(__file__).parents[1] / "fixtures" / "made_by_a2e80d5"
CLOSE = 1e-6  # of losses, relative: what another CPU's rounding comes to in a few steps is a tenth of it


def numbers(name: str) -> dict[int, float]:
    """What was recorded under ``name``, by step."""
    return {int(step): value for step, value in recorded()[name].items()}


def recorded() -> dict:
    return json.loads((OLD / "recorded.json").read_text())


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with copies of run/ and dataset/, which are elsewhere than when they were made."""
    for part in ("run", "dataset"):
        shutil.copytree(OLD / part, tmp_path / part)
    return tmp_path


def config_of(place: Path, *changes: str) -> Config:
    return load_config(str(OLD / "config.yaml"), [f"run={place}/run", f"data.url={place}/dataset", *changes])


def said(*command: str) -> dict | list:
    """What a command prints with --json, in whatever process this is called."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*command, "--json"]) == 0
    return json.loads(out.getvalue())


def digest_of(images: list[tuple]) -> str:
    """Of what a step trained on, as recorded.json has it."""
    return hashlib.sha256(json.dumps(images).encode()).hexdigest()[:16]


def test_the_run_opens(place):
    report = said("status", str(place / "run"))
    assert [(a["code"], a["why"], a["last_step"]) for a in report["attempts"]] == [
        (75, "SIGTERM: saved at step 7", 7),
        (None, "killed or still running", None),
    ]
    assert report["last_commit"]["step"] == recorded()["commit"] and report["stop_requested"] is False
    (commit,) = said("checkpoint", "list", str(place / "run"))
    assert commit == {
        "step": 7,
        "time": "2026-11-30T09:01:10.724405+00:00",
        "attempt": 1,
        "path": "steps/00000007.0001",
    }
    assert list(losses(str(place / "run"))) == [1, 2, 3, 4, 5, 6, 7]


def test_commit_and_dataset_are_whole(place):
    assert said("checkpoint", "verify", str(place / "run")) == [{"step": 7, "problems": []}]
    for url in (place / "dataset", place / "dataset" / "holdout"):
        assert said("shard", "verify", str(url))["problems"] == []
    file = place / "run" / "steps" / "00000007.0001" / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert main(["checkpoint", "verify", str(place / "run")]) == 2


def test_the_commit_gives_the_pictures_of_then(place):
    out = place / "sample.png"
    words = ["--size", "32x32", "--size", "16x48", "--classes", "0,3", "--steps", "6", "--cfg", "2", "--seed", "5"]
    words += [f"data.url={place}/dataset", "--out", str(out)]
    (report,) = run_ranks(1, said, "sample", str(place / "run"), *words)
    assert report["step"] == 7 and report["nfe"] == 6
    now, then = (np.asarray(Image.open(file)).astype(int) for file in (out, OLD / "sample.png"))
    assert now.shape == then.shape and np.abs(now - then).max() <= 1 and (now != then).mean() < 0.01


def test_the_commit_has_the_validation_loss_of_then(place):
    (report,) = run_ranks(1, said, "validate", str(place / "run"), f"data.url={place}/dataset")
    assert report["images"] == 4 and report["val_loss_ema"] == pytest.approx(recorded()["val_loss_ema"], rel=CLOSE)


def test_the_run_continues_as_then(place):
    """In two more attempts, of which the second begins with a commit that the code under test has written."""
    run, identity = str(place / "run"), (place / "run" / "run.json").read_bytes()
    begun = losses(run)
    assert run_ranks(1, train, config_of(place, "train.steps=12")) == [0]
    assert run_ranks(1, train, config_of(place)) == [0]

    assert losses(run) == pytest.approx(begun | numbers("losses"), rel=CLOSE)
    assert {step: begun[step] for step in begun} == {step: losses(run)[step] for step in begun}
    records = [r for r in read(Run.open(run)) if r.metrics]
    norms = {r.step: r.metrics["grad_norm"] for r in records if r.step > 7 and "grad_norm" in r.metrics}
    assert norms == pytest.approx(numbers("grad_norms"), rel=10 * CLOSE)
    validated = {r.step: r.metrics for r in records if "val_loss" in r.metrics}
    expected = numbers("validation")
    assert list(validated) == list(expected)
    for step in expected:
        assert validated[step] == pytest.approx(expected[step], rel=CLOSE)
    assert {k + 1: digest_of(images) for k, images in trained(run).items()} == numbers("trained")

    assert (place / "run" / "run.json").read_bytes() == identity
    assert [c["step"] for c in said("checkpoint", "list", run)] == [12, 18]  # the old one was retired like any other
    assert [c["problems"] for c in said("checkpoint", "verify", run)] == [[], []]
    assert [a["code"] for a in said("status", run)["attempts"]] == [75, None, 0, 0]


def test_the_run_still_knows_what_it_trains(place):
    """The half of the config in its run.json is compared: what is refused is named, what is free is not."""
    for change, difference in (
        ("optimizer.lr=0.001", r"optimizer\.lr: 0\.005 -> 0\.001"),
        ("seed=1", r"seed: 12345678901 -> 1"),
        ("data.views=crop", r'data\.views: "mixed" -> "crop"'),
    ):
        with pytest.raises(UserError, match=difference):
            run_ranks(1, train, config_of(place, change))
    free = ["batch.images=12", "train.log_every=5", "layout.max_tokens=128", "train.steps=8"]
    assert run_ranks(1, train, config_of(place, *free)) == [0]
