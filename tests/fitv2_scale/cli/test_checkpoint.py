"""`fitv2 checkpoint list | verify | export | import | sweep`: what --json says, and one sentence for each bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.load import load_config
from fitv2_scale.model.counts import logical_shapes
from fitv2_scale.run.run import Run
from tests.support.checkpoint_state import State, opened, saver
from tests.support.ranks import run_ranks

CONFIG = "configs/demo.yaml"


def two_saves(url: str) -> dict[str, np.ndarray]:
    """Commits steps 1 and 2; returns the state of step 2."""
    with opened({}, url) as (world, run):
        save = saver(world, run)
        assert [save(1), save(2)] == [None, None]
        return {name: tensor.numpy() for name, tensor in State(2, world).tensors.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("runs") / "run")
    return url, run_ranks(1, two_saves, url)[0]


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


@pytest.fixture
def weights(tmp_path) -> Path:
    """Of the demo's network."""
    shapes = logical_shapes(load_config(CONFIG).model)
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def said(capfd, *command: str) -> dict | list:
    assert main(["checkpoint", *command, "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return json.loads(out)


def refused(capfd, *command: str) -> tuple[str, str]:
    """What a command that exits with 2 writes to stdout, and its one sentence."""
    assert main(["checkpoint", *command, "--json"]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("fitv2: ") and err.count("\n") == 1
    return out, err


def test_list(run, capfd):
    first, second = said(capfd, "list", str(run))
    assert set(first) == {"step", "time", "attempt", "path"} and (first["step"], second["step"]) == (1, 2)
    assert second["path"] == "steps/00000002.0001" and second["attempt"] == 1


def test_list_of_a_run_without_commits(tmp_path, capfd):
    Run.open_or_create(str(tmp_path / "new"), {}, {}, None)
    assert said(capfd, "list", str(tmp_path / "new")) == []
    assert main(["checkpoint", "list", str(tmp_path / "new")]) == 0 and capfd.readouterr().out == "no commit yet\n"


def test_verify(run, capfd):
    assert said(capfd, "verify", str(run)) == [{"step": 1, "problems": []}, {"step": 2, "problems": []}]


def test_verify_says_what_is_damaged_and_fails(run, capfd):
    (run / "steps/00000002.0001/rank-00000.safetensors").write_bytes(b"")
    out, err = refused(capfd, "verify", str(run))
    whole, damaged = json.loads(out)
    assert whole == {"step": 1, "problems": []} and damaged["step"] == 2
    assert "rank-00000.safetensors has 0 bytes" in damaged["problems"][0]
    assert "the commits at step 2 are not whole; the next attempt continues from step 1" in err
    (record,) = (json.loads(path.read_text()) for path in (run / "quarantine").iterdir())
    assert record["path"] == "steps/00000002.0001" and record["problem"] == damaged["problems"][0]
    assert main(["status", str(run)]) == 0
    shown = capfd.readouterr().out
    assert f"the commit steps/00000002.0001 is damaged: {damaged['problems'][0]}" in shown
    assert "the next attempt continues from step 1" in shown
    (run / "steps/00000001.0001/manifest.json").unlink()
    assert "at step 1, 2 are not whole; restore their files, or start" in refused(capfd, "verify", str(run))[1]


@pytest.mark.parametrize("kind", ["param", "ema"])
def test_export(run, saved, tmp_path, capfd, kind):
    out = str(tmp_path / "out.safetensors")
    report = said(capfd, "export", str(run), out, *(["--ema"] if kind == "ema" else []))
    assert report == {"file": out, "step": 2, "ema": kind == "ema", "format": "fit"}
    found = load_file(out)
    assert found and all((found[name].numpy() == saved[1][f"{kind}/{name}"]).all() for name in found)


def test_export_of_what_is_not_there(run, tmp_path, capfd):
    out = str(tmp_path / "out.safetensors")
    assert "has no commit at step 7" in refused(capfd, "export", str(run), out, "--step", "7")[1]
    nowhere = str(tmp_path / "none" / "out.safetensors")
    assert "does not exist: make it first" in refused(capfd, "export", str(run), nowhere)[1]
    (run / "steps/00000002.0001/rank-00000.safetensors").unlink()
    assert "choose another --step" in refused(capfd, "export", str(run), out)[1]
    assert not Path(out).exists()
    assert said(capfd, "export", str(run), out, "--step", "1")["step"] == 1
    Run.open_or_create(str(tmp_path / "new"), {}, {}, None)
    assert "has no commit" in refused(capfd, "export", str(tmp_path / "new"), out)[1]


def test_import(weights, tmp_path, capfd):
    target = str(tmp_path / "imported")
    command = ("import", str(weights), target, "--config", CONFIG)
    assert said(capfd, *command) == {"run": target, "step": 0, "part": "", "layout": "fit"}
    assert said(capfd, "verify", target) == [{"step": 0, "problems": []}]
    assert "has commits already: import into a new run folder" in refused(capfd, *command)[1]


def test_import_of_what_does_not_fit(weights, run, tmp_path, capfd):
    target = str(tmp_path / "imported")

    def sentence(file: Path, config: str = CONFIG) -> str:
        out, err = refused(capfd, "import", str(file), target, "--config", config)
        assert out == "" or set(json.loads(out)) == {"missing", "left_over"}
        return err

    (tmp_path / "weights.ckpt").write_bytes(b"x")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:-1])
    torch.save({"step": 3}, tmp_path / "other.bin")
    assert "there is no weights file" in sentence(tmp_path / "none.safetensors")
    assert "weights come as .safetensors, .bin or .pt" in sentence(tmp_path / "weights.ckpt")
    assert "not a complete .safetensors file" in sentence(tmp_path / "cut.safetensors")
    assert "does not load as plain tensors" in sentence(tmp_path / "other.bin")
    assert "(model.depth is " in sentence(weights, "configs/fitv2_b2.yaml")
    assert "none.yaml" in sentence(weights, "none.yaml")
    assert not Path(target).exists()
    assert "holds a different run" in refused(capfd, "import", str(weights), str(run), "--config", CONFIG)[1]


def test_sweep(run, capfd):
    """The rest is in test_run_s3, for both kinds of storage."""
    nothing = {"abandoned": [], "retired": [], "uploads": [], "deleted": False}
    assert said(capfd, "sweep", str(run)) == nothing
    assert said(capfd, "sweep", str(run), "--yes") == {**nothing, "deleted": True}


@pytest.mark.parametrize("command", ["list", "verify", "sweep", "export"])
def test_what_is_no_run(run, tmp_path, capfd, command):
    more = [str(tmp_path / "out.safetensors")] if command == "export" else []
    assert "is not a run (it has no run.json); check the path" in refused(capfd, command, str(tmp_path), *more)[1]
    (run / "log/00000002").write_bytes(b"{")
    assert "log/00000002 is not a log entry" in refused(capfd, command, str(run), *more)[1]
    (run / "run.json").write_bytes(b"{")
    assert "run.json is damaged" in refused(capfd, command, str(run), *more)[1]
