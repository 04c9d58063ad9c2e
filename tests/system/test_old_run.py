"""A dataset and a run that commit a2e80d5 wrote still open, verify, sample and continue.

The files, and the numbers that the code of that commit measured, are in tests/fixtures/made_by_a2e80d5; its README says
how they were made. Every expected number here comes from there, none from the code under test.
"""

import contextlib
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image as Picture

from data_sharding.errors import DataError, UserError
from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.load import load_config
from fitv2_scale.config.schema import Config
from fitv2_scale.run.run import Run
from fitv2_scale.tracking.journal import read
from fitv2_scale.train.loop import train
from tests.oracle.draws import NOISE, words
from tests.oracle.network import Form
from tests.oracle.training import Image, Noised, Recipe
from tests.support.newer_config import newer
from tests.support.planned_images import planned_images
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
def copies(tmp_path) -> Path:
    """A folder with copies of run/ and dataset/, which are elsewhere than when they were made."""
    for part in ("run", "dataset"):
        shutil.copytree(OLD / part, tmp_path / part)
    return tmp_path


def config_of(copies: Path, *changes: str, run: str = "run") -> Config:
    return load_config(str(OLD / "config.yaml"), [f"run={copies}/{run}", f"data.url={copies}/dataset", *changes])


def said(*command: str) -> dict | list:
    """What a command prints with --json, in whatever process this is called."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*command, "--json"]) == 0
    return json.loads(out.getvalue())


def digest_of(images: list[tuple]) -> str:
    """Of what a step trained on, as recorded.json has it."""
    return hashlib.sha256(json.dumps(images).encode()).hexdigest()[:16]


def integers_of(recipe: Recipe, image: Image) -> tuple:
    """(epoch, id, bits of t, digest of the integers behind the noise): what a2e80d5's audit said of an image."""
    count = image.latents.size
    noise = np.array(words(recipe.seed, NOISE, image.epoch, image.number, count), "<u4")
    epoch, number, t, *_ = Noised.of(image, recipe).record(image)
    return epoch, number, t, xxhash.xxh3_64_hexdigest(noise.tobytes())


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def newest(run: str) -> Path:
    """The folder of the newest commit."""
    return Path(run, Run.open(run).log.commits()[-1].fields["path"])


def test_the_run_opens(copies):
    report = said("status", str(copies / "run"))
    assert [(a["code"], a["why"], a["last_step"]) for a in report["attempts"]] == [
        (75, "SIGTERM: saved at step 7", 7),
        (None, "killed or still running", None),
    ]
    assert report["last_commit"]["step"] == recorded()["commit"] and report["stop_requested"] is False
    (commit,) = said("checkpoint", "list", str(copies / "run"))
    assert commit == {
        "step": 7,
        "time": "2026-11-30T09:01:10.724405+00:00",
        "attempt": 1,
        "path": "steps/00000007.0001",
    }
    assert list(losses(str(copies / "run"))) == [1, 2, 3, 4, 5, 6, 7]


def test_commit_and_dataset_are_whole(copies):
    assert said("checkpoint", "verify", str(copies / "run")) == [{"step": 7, "problems": []}]
    for url in (copies / "dataset", copies / "dataset" / "holdout"):
        assert said("shard", "verify", str(url))["problems"] == []
    file = copies / "run" / "steps" / "00000007.0001" / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert main(["checkpoint", "verify", str(copies / "run")]) == 2


def test_sampling_gives_the_recorded_pictures(copies):
    out = copies / "sample.png"
    words = ["--size", "32x32", "--size", "16x48", "--classes", "0,3", "--steps", "6", "--cfg", "2", "--seed", "5"]
    words += [f"data.url={copies}/dataset", "--out", str(out)]
    (report,) = run_ranks(1, said, "sample", str(copies / "run"), *words)
    assert report["step"] == 7 and report["nfe"] == 6
    now, then = (np.asarray(Picture.open(file)).astype(int) for file in (out, OLD / "sample.png"))
    assert now.shape == then.shape and np.abs(now - then).max() <= 1 and (now != then).mean() < 0.01


def test_validation_gives_the_recorded_loss(copies):
    (report,) = run_ranks(1, said, "validate", str(copies / "run"), f"data.url={copies}/dataset")
    assert report["images"] == 4 and report["val_loss_ema"] == pytest.approx(recorded()["val_loss_ema"], rel=CLOSE)


def test_the_run_continues_with_the_recorded_losses(copies):
    """In two more attempts, of which the second begins with a commit that the code under test has written."""
    run, identity = str(copies / "run"), (copies / "run" / "run.json").read_bytes()
    begun = losses(run)
    assert run_ranks(1, train, config_of(copies, "train.steps=12")) == [0]
    assert run_ranks(1, train, config_of(copies)) == [0]

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
    images, recipe = planned_images(config_of(copies)), Recipe(12345678901, Form(classes=4))
    integers = {k + 1: digest_of(sorted(integers_of(recipe, image) for image in images(k))) for k in range(18)}
    assert integers == numbers("trained")
    expected = {k: sorted(Noised.of(image, recipe).record(image) for image in images(k)) for k in range(7, 18)}
    assert trained(run, since=7) == expected

    assert (copies / "run" / "run.json").read_bytes() == identity
    assert [c["step"] for c in said("checkpoint", "list", run)] == [12, 18]  # that of step 7 was retired like any other
    assert [c["problems"] for c in said("checkpoint", "verify", run)] == [[], []]
    assert [a["code"] for a in said("status", run)["attempts"]] == [75, None, 0, 0]
    then, now = manifest(OLD / "run" / "steps" / "00000007.0001"), manifest(newest(run))
    assert list(now) == list(then) and list(now["cursor"]) == list(then["cursor"])
    assert then["accounting"].keys() <= now["accounting"].keys()  # what was counted then is counted still
    assert {name: tensor["shape"] for name, tensor in now["tensors"].items()} == {
        name: tensor["shape"] for name, tensor in then["tensors"].items()
    }


def test_another_recipe_is_refused_and_another_runtime_is_not(copies):
    """Its run.json calls the recipe "science", the word of its time; it is compared all the same."""
    for change, difference in (
        ("optimizer.lr=0.001", r"optimizer\.lr: 0\.005 -> 0\.001"),
        ("seed=1", r"seed: 12345678901 -> 1"),
        ("data.views=crop", r'data\.views: "mixed" -> "crop"'),
    ):
        with pytest.raises(UserError, match=difference):
            run_ranks(1, train, config_of(copies, change))
    free = ["batch.images=12", "train.log_every=5", "layout.max_tokens=128", "train.steps=8"]
    assert run_ranks(1, train, config_of(copies, *free)) == [0]


def test_it_continues_under_a_version_with_more_keys(copies):
    """One more in model, optimizer and data each. At their defaults the run continues with its old losses."""
    identity = (copies / "run" / "run.json").read_bytes()
    assert run_ranks(1, train, newer(config_of(copies, "train.steps=8"))) == [0]
    assert losses(str(copies / "run"))[8] == pytest.approx(numbers("losses")[8], rel=CLOSE)
    assert (copies / "run" / "run.json").read_bytes() == identity
    with pytest.raises(UserError, match=r"model\.registers: 0 -> 4"):
        run_ranks(1, train, newer(config_of(copies, "train.steps=9"), model={"registers": 4}))


def test_an_edited_recipe_is_found_out(copies):
    """Also when the config was changed along with it, so that the two agree and only the hash tells."""
    file = copies / "run" / "run.json"
    identity = json.loads(file.read_text())
    assert "recipe" not in identity and identity["science"]["optimizer"]["lr"] == 0.005
    identity["science"]["optimizer"]["lr"] = 0.001
    file.write_text(json.dumps(identity))
    config = config_of(copies, "optimizer.lr=0.001")
    with pytest.raises(DataError, match=r"run\.json was edited"):
        Run.open_or_create(config.run, config.model_dump(mode="json"), config.recipe(), identity["plan_hash"])


def test_a_fork_continues_with_the_recorded_loss(copies):
    """Its recipe also has the keys that the parent's version did not know, with what they were then."""
    assert run_ranks(1, train, config_of(copies, "train.steps=8", run="child"), f"{copies}/run@7") == [0]
    assert losses(f"{copies}/child") == pytest.approx({8: numbers("losses")[8]}, rel=CLOSE)
    written = json.loads((copies / "child" / "run.json").read_text())
    parent = json.loads((OLD / "run" / "run.json").read_text())
    recipe = parent["science"] | {"objective": "flow", "ddpm": {"label_dropout": 0.1}}
    recipe["model"] |= {"patch": 2, "latent_channels": 4, "mlp": "swiglu", "position": "rope", "outputs": 1}
    recipe["model"] |= {"sincos": {"mode": "none", "train_side": 16}}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert (written["recipe"], written["recipe_hash"]) == (recipe, digest)
    assert written["parent"]["run"] == parent["id"] and "science" not in written
