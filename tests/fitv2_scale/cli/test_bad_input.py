"""What a user can get wrong: one clear sentence, exit code 2, never a hang, nothing lost."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from data_sharding.errors import DataError, UserError
from data_sharding.format.manifest import Manifest
from fitv2_scale.cli.__main__ import main
from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from fitv2_scale.train.loop import BAD_INPUT, train
from tests.services.s3 import use
from tests.support.changed_losses import ChangedLosses
from tests.support.ranks import run_ranks


@pytest.fixture
def fitv2(capfd):
    """Runs the program; gives exit code and stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        code = main(list(arguments))
        return code, capfd.readouterr().err

    return run


def assert_one_sentence(code: int, stderr: str, pattern: str) -> None:
    lines = [line for line in stderr.splitlines() if line.startswith("fitv2: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in stderr, stderr
    assert re.search(pattern, lines[0]), lines[0]


@pytest.fixture
def config_file(tiny, tmp_path):
    def write(**changes) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tiny(**changes).model_dump(mode="json")))
        return str(path)

    return write


@pytest.mark.parametrize(
    "override,pattern",
    [
        ("optimizer.lrr=1", "unknown key optimizer.lrr, did you mean optimizer.lr?"),
        ("optimser.lr=1", "unknown key optimser, did you mean optimizer?"),
        ("steps=7", "unknown key steps, did you mean train.steps?"),
        ("train.steps=many", "train.steps = 'many'.*integer"),
        ("batch.images=0", "batch.images = 0.*greater than or equal to 1"),
        ("model.heads=3", "hidden 32 must be heads 3 times a multiple of 4"),
        ("sampling.sizes=[100x100]", "size '100x100': give HEIGHTxWIDTH in pixels, multiples of 16"),
        ("train.steps", "is not of the form key=value"),
        ("data.url=/no/such/set", "there is no dataset at /no/such/set"),
        ("run=s3://bucket/run", "access to s3://bucket/run/run.json is refused"),
        ("run=''", "give the run's folder as run=FOLDER"),
        ("layout.replicate=2", "layout.replicate is 2, which does not divide the 1 processes"),
        ("layout.max_tokens=64 batch.images=500", "batch.images is 500, but .* holds 240 images"),
        ("data.url=preset:imagenet256", "preset:imagenet256 has sizes only"),
        ("data.url=[a,b] data.weights=[1]", "there is no dataset at a"),
        ("trainable=[nothing*]", "no tensor's name matches"),
    ],
)
def test_train_config(fitv2, config_file, tmp_path, monkeypatch, override, pattern):
    files = dict.fromkeys(("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"), str(tmp_path / "nothing"))
    use(monkeypatch, files | {"AWS_EC2_METADATA_DISABLED": "true"})  # no login to S3, whatever this machine has
    assert_one_sentence(*fitv2("train", config_file(), *override.split(" ")), pattern)
    assert not (tmp_path / "run" / "steps").exists()


def test_the_program_itself_exits_with_2(config_file):
    command = [sys.executable, "-m", "fitv2_scale.cli", "train", config_file(), "seed=-1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert_one_sentence(done.returncode, done.stderr, "seed = -1.*greater than or equal to 0")


def test_config_files(fitv2, tmp_path):
    assert_one_sentence(*fitv2("train", str(tmp_path / "none.yaml")), "cannot read the config .* No such file")
    (tmp_path / "bad.yaml").write_text("model: {depth: 2\n")
    assert_one_sentence(*fitv2("config", "show", str(tmp_path / "bad.yaml")), "is not YAML")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert_one_sentence(*fitv2("plan", str(tmp_path / "list.yaml")), "must hold a mapping")
    (tmp_path / "few.yaml").write_text("model: {depth: 2, hidden: 32, heads: 2}\ndata: {url: x}\n")
    assert_one_sentence(*fitv2("plan", str(tmp_path / "few.yaml")), "train is missing")


def test_a_picture_that_cannot_be_written(fitv2, dataset, tmp_path):
    for name, said in [("out/x.png", f"there is no folder {tmp_path}/out, make it first"), ("x.odd", "'odd'")]:
        path = str(tmp_path / name)
        assert_one_sentence(*fitv2("shard", "inspect", dataset, "--picture", path), f"cannot write {path}: .*{said}")


def test_an_empty_source_folder(fitv2, tmp_path):
    (tmp_path / "src").mkdir()
    assert_one_sentence(*fitv2("shard", "write", str(tmp_path / "src"), str(tmp_path / "dst")), str(tmp_path / "src"))
    assert not (tmp_path / "dst" / "manifest.json").exists()


def test_a_truncated_jpeg_among_good_ones(tmp_path, capsys):
    """The rest is written and can be used; the bad one is named; the exit code says that not all went in."""
    source = tmp_path / "src" / "cat"
    source.mkdir(parents=True)
    for i in range(6):
        Image.effect_noise((64, 48), 80).convert("RGB").save(source / f"{i}.jpg")
    (source / "3.jpg").write_bytes((source / "3.jpg").read_bytes()[:900])
    dst = str(tmp_path / "dst")
    for _ in range(2):  # and says so again when there is nothing left to do
        assert main(["shard", "write", str(tmp_path / "src"), dst, "--workers", "1"]) == 2
        told = f"1 of the images cannot be read and were left out, all others are written; {dst}/skipped.json lists"
        assert told in capsys.readouterr().err
    assert len(Manifest.load(dst).sample_id) == 5
    assert "cat/3.jpg" in Path(dst, "skipped.json").read_text()
    assert main(["shard", "verify", dst]) == 0


@pytest.fixture
def damaged(dataset, tmp_path):
    """A copy of the dataset to damage, and one of its shards, not the first."""
    copy = tmp_path / "damaged"
    shutil.copytree(dataset, copy)
    return copy, copy / Manifest.load(str(copy)).shards[-1].name


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_damaged_shard_stops_training_on_all_ranks(tiny, damaged, size, damage):
    """A short shard is needed by few steps and not by all ranks at once: no rank may wait for another for ever."""
    folder, shard = damaged
    if damage == "missing":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[len(data) // 3] ^= 4
        shard.write_bytes(data)
    config = tiny(data__url=str(folder), checkpoint__every_steps=1, train__steps=100)
    cause = "the shard is missing" if damage == "missing" else "do not match their digest"
    with pytest.raises(DataError, match=f"{shard.name}, frame .*{cause}"):
        run_ranks(size, train, config)
    report = status(Run.open(config.run))
    assert report["attempts"][0]["code"] == BAD_INPUT and shard.name in report["attempts"][0]["why"]
    if report["last_commit"]:  # the steps before are kept, and the run continues once the shard is back
        assert report["last_commit"]["step"] >= 1
    original = Path(tiny().data.url, shard.name)
    shutil.copy(original, shard)
    assert run_ranks(size, train, tiny(data__url=str(folder), train__steps=25)) == [0] * size


def test_a_dataset_with_more_classes_than_the_model(fitv2, config_file):
    assert_one_sentence(
        *fitv2("train", config_file(model__classes=3)), "has 5 classes, the model only 3: set model.classes=5"
    )


def test_more_ranks_than_images_in_a_step(tiny):
    with pytest.raises(UserError, match="4 data-parallel ranks are more than the 3 images of a step"):
        run_ranks(4, train, tiny(batch__images=3))


def test_reports_on_what_is_not_there(fitv2, tmp_path):
    for command in (["status"], ["checkpoint", "list"], ["checkpoint", "verify"], ["track", "sync"], ["sample"]):
        assert_one_sentence(*fitv2(*command, str(tmp_path)), "is not a run")
    assert_one_sentence(*fitv2("checkpoint", "export", str(tmp_path), "x.safetensors"), "is not a run")
    assert_one_sentence(*fitv2("shard", "inspect", str(tmp_path)), "there is no dataset at")


def test_gradients_that_stay_infinite_end_the_run(tiny):
    """Steps whose gradient is not finite change nothing; too many in a row end with 93: do not try again."""
    from tests.support.commits import commit_bytes

    steady = tiny("steady", train__steps=1, checkpoint__every_steps=1)
    assert run_ranks(2, train, steady) == [0, 0]
    before = commit_bytes(steady.run)
    assert run_ranks(2, train_on_nan, tiny("steady", train__steps=9, train__max_skipped=3)) == [93, 93]
    assert "not finite in 3 steps in a row" in status(Run.open(steady.run))["attempts"][1]["why"]
    assert commit_bytes(steady.run) == before


def train_on_nan(config) -> int:
    import fitv2_scale.train.loop as module

    train_step = module.train_step

    def poisoned(losses):
        return replace(losses, loss_I=losses.loss_I * float("nan"))

    def step(engine, batch, objective, *rest):
        return train_step(engine, batch, ChangedLosses(objective, poisoned), *rest)

    module.train_step = step
    return train(config)
