"""Checkpoints: any layout reads any other's, damage is found and passed over, and nothing is unpickled."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lineage import commit_bytes
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_sharding.errors import UserError
from fitv2_scale.checkpoint.checkpointer import verify_commit
from fitv2_scale.checkpoint.storage import BoxReader
from fitv2_scale.checkpoint.weights import export_weights, import_weights
from fitv2_scale.cli import main
from fitv2_scale.config import load_config
from fitv2_scale.model.counts import logical_shapes
from fitv2_scale.run import Run
from fitv2_scale.train import train


def newest(run: str) -> Path:
    return Path(run, Run.open(run).log.commits()[-1].fields["path"])


def logical(run: str) -> dict[str, torch.Tensor]:
    """All tensors of the newest commit, whole, through the manifest."""
    opened, folder = Run.open(run), newest(run)
    manifest = json.loads((folder / "manifest.json").read_text())
    reader = BoxReader(opened.store, str(folder.relative_to(run)), manifest)
    return {name: reader.read_tensor(name) for name in manifest["tensors"]}


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A short run on three ranks: odd shapes everywhere (85-wide MLP, 6 label rows)."""
    from conftest import make_tiny

    config = make_tiny(dataset, tmp_path_factory.mktemp("trained"), "run", train__steps=4)
    assert run_ranks(3, train, config) == [0, 0, 0]
    return config


def test_the_commit_holds_every_logical_tensor_once(trained):
    shapes = logical_shapes(trained.model)
    tensors = logical(trained.run)
    kinds = ("param", "ema", "exp_avg", "exp_avg_sq")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        f"{k}/{n}": s for k in kinds for n, s in shapes.items()
    }
    manifest = json.loads((newest(trained.run) / "manifest.json").read_text())
    for name, tensor in manifest["tensors"].items():
        covered = np.zeros(tensor["shape"], int)
        for box in tensor["boxes"]:
            covered[tuple(slice(o, o + n) for o, n in zip(box["offset"], box["shape"], strict=True))] += 1
        assert (covered == 1).all(), name
    assert manifest["scalars"] == {"optimizer_step": 4.0} and manifest["moments"] == sorted(shapes)
    assert len(json.dumps(manifest["cursor"])) < 1024


def test_anyone_can_read_the_files(trained):
    for file in newest(trained.run).glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            keys = list(opened.keys())
            assert keys and all(np.isfinite(opened.get_tensor(key)).all() for key in keys)
    suffixes = {p.suffix for p in Path(trained.run, "steps").rglob("*") if p.is_file()}
    assert suffixes == {".safetensors", ".json"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "remove manifest", "pickle"])
def test_a_damaged_commit_is_passed_over(tiny, damage):
    config = tiny(train__steps=10)
    assert run_ranks(2, train, config) == [0, 0]
    undisturbed = commit_bytes(config.run)
    file = newest(config.run) / ("manifest.json" if "manifest" in damage else "rank-00001.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-1])
    elif damage == "manifest":
        file.write_bytes(data.replace(b'"begin": ', b'"begin":  ', 1))
    elif damage == "pickle":
        planted = Path(config.run, "planted")
        file.write_bytes(pickle.dumps(_Touch(str(planted))))
    else:
        file.unlink()
    assert verify_commit(Run.open(config.run), Run.open(config.run).log.commits()[-1])

    longer = tiny(train__steps=12)
    assert run_ranks(2, train, longer) == [0, 0]  # from step 5 again
    record = json.loads(next(Path(config.run, "quarantine").iterdir()).read_text())
    assert record["path"] == "steps/00000010.0001" and file.name in record["problem"]
    assert Path(config.run, "steps/00000010.0001").exists()  # nothing was deleted
    assert not Path(config.run, "planted").exists()
    whole = tiny("whole", train__steps=12)
    assert run_ranks(2, train, whole) == [0, 0]
    assert commit_bytes(config.run) == commit_bytes(whole.run) != undisturbed


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mknod, (self.path,)


def test_when_no_commit_is_whole_training_stops_with_a_sentence(tiny):
    config = tiny(train__steps=5)
    assert run_ranks(2, train, config) == [0, 0]
    (newest(config.run) / "rank-00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"no commit is whole: .*step 5.*rank-00000.safetensors is missing"):
        run_ranks(2, train, tiny(train__steps=8))
    assert newest(config.run).exists()


def test_retention_keeps_the_last(tiny):
    config = tiny(train__steps=12, checkpoint__every_steps=2, checkpoint__keep_last=2)
    assert run_ranks(1, train, config) == [0]
    assert [e.fields["step"] for e in Run.open(config.run).log.commits()] == [10, 12]
    assert sorted(p.name for p in Path(config.run, "steps").iterdir()) == ["00000010.0001", "00000012.0001"]


def test_frozen_tensors_have_no_moments(tiny):
    config = tiny(trainable=["blocks.*.adaLN_modulation.*"], train__steps=3)
    assert run_ranks(2, train, config) == [0, 0]
    tensors = logical(config.run)
    moments = {n.split("/", 1)[1] for n in tensors if n.startswith("exp_avg/")}
    assert moments == {n for n in logical_shapes(config.model) if ".adaLN_modulation." in n and n.startswith("blocks")}
    for name in logical_shapes(config.model):
        if name not in moments:
            assert torch.equal(tensors[f"param/{name}"], tensors[f"ema/{name}"])
    assert run_ranks(1, train, tiny(trainable=["blocks.*.adaLN_modulation.*"], train__steps=5)) == [0]


# Public weights


def public(config) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return {name: torch.randn(shape) for name, shape in logical_shapes(config.model).items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_public_weights_go_in_and_out_unchanged(tiny, tmp_path, suffix):
    config, weights = tiny(), public(tiny())
    file = str(tmp_path / f"weights{suffix}")
    save_file(weights, file) if suffix == ".safetensors" else torch.save(weights, file)
    import_weights(file, config.run, config)
    for ema in (False, True):
        out = str(tmp_path / "out.safetensors")
        assert export_weights(config.run, out, ema=ema) == 0
        found = load_file(out)
        assert found.keys() == weights.keys()
        assert all(found[n].numpy().tobytes() == weights[n].numpy().tobytes() for n in weights)


def test_training_goes_on_from_imported_weights(tiny, tmp_path):
    config, file = tiny(train__steps=3), str(tmp_path / "weights.safetensors")
    weights = public(config)
    save_file(weights, file)
    import_weights(file, config.run, config)
    assert run_ranks(2, train, config) == [0, 0]
    found = logical(config.run)
    for name, value in weights.items():
        moved = (found[f"param/{name}"] - value).abs().max()
        assert moved < 3e-3, name  # three warm-up steps at lr <= 3e-4
    assert Run.open(config.run).log.commits()[-1].fields["step"] == 3


@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda w: w.pop("final_layer.linear.bias"),
            "1 tensors are missing .final_layer.linear.bias. and 0 are left over",
        ),
        (lambda w: w.update(extra=torch.zeros(1)), "0 tensors are missing .none. and 1 are left over .extra."),
        (
            lambda w: w.update({"x_embedder.proj.bias": torch.zeros(7)}),
            r"x_embedder.proj.bias is \(7,\), the config wants",
        ),
        (lambda w: w.update({"x_embedder.proj.bias": torch.zeros(32).half()}), "only float32"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tiny, tmp_path, change, message):
    config, file = tiny(), str(tmp_path / "weights.safetensors")
    weights = public(config)
    change(weights)
    save_file(weights, file)
    with pytest.raises(UserError, match=message):
        import_weights(file, config.run, config)
    assert not Path(config.run).exists()


def test_a_malicious_or_damaged_weights_file_is_refused(tiny, tmp_path):
    config, planted = tiny(), tmp_path / "planted"
    bad = tmp_path / "bad.bin"
    torch.save({"x": _Touch(str(planted))}, bad)
    with pytest.raises(UserError, match="does not load as plain tensors"):
        import_weights(str(bad), config.run, config)
    assert not planted.exists()
    cut = tmp_path / "cut.safetensors"
    save_file(public(config), cut)
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole .safetensors file"):
        import_weights(str(cut), config.run, config)
    with pytest.raises(UserError, match="there is no weights file"):
        import_weights(str(tmp_path / "none.bin"), config.run, config)


def test_the_names_that_do_not_fit_are_listed(tiny, tmp_path, capfd):
    config, file = tiny(), tmp_path / "weights.safetensors"
    weights = public(config)
    gone = sorted(weights)[:5]
    save_file({name: t for name, t in weights.items() if name not in gone} | {"extra": torch.zeros(1)}, file)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert main(["checkpoint", "import", str(file), config.run, "--config", str(path), "--json"]) == 2
    said = capfd.readouterr()
    assert json.loads(said.out) == {"missing": gone, "left_over": ["extra"]} and "5 tensors are missing" in said.err


_MEASURED = """
import resource, sys
from fitv2_scale.checkpoint.weights import export_weights, import_weights
from fitv2_scale.config import load_config

config = load_config(sys.argv[1], ["data.url=none", "train.steps=1"])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
before = peak()
import_weights(sys.argv[2], sys.argv[3], config)
export_weights(sys.argv[3], sys.argv[4], ema=True)
print(peak() - before)
"""


@pytest.mark.parametrize(
    "name,suffix",
    [
        ("fitv2_b2", ".safetensors"),
        ("fitv2_b2", ".bin"),
        pytest.param("fitv2_xl2", ".bin", marks=pytest.mark.long),
    ],
)
def test_memory_does_not_grow_with_the_file(tmp_path, name, suffix):
    """0.5 GB of weights, and 2.7 GB, in and out in the same extra memory: chunks under way, a tensor or two."""
    config = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    shapes = logical_shapes(load_config(str(config), ["data.url=none", "train.steps=1"]).model)
    weights = {n: torch.full(shape, float(i)) for i, (n, shape) in enumerate(shapes.items())}
    file, out = str(tmp_path / f"in{suffix}"), str(tmp_path / "out.safetensors")
    save_file(weights, file) if suffix == ".safetensors" else torch.save(weights, file)
    command = [sys.executable, "-c", _MEASURED, str(config), file, str(tmp_path / "run"), out]
    extra = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)
    assert extra < 250e6
    with safe_open(out, framework="pt") as opened:
        assert all(torch.equal(opened.get_tensor(n), weights[n]) for n in shapes)
