"""Public weights in and out: unchanged, complete, nothing unpickled, in memory that does not grow with the file."""

import json
import math
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_sharding.errors import UserError
from fitv2_scale.checkpoint.restore import restore
from fitv2_scale.checkpoint.weights import export_weights, import_weights
from fitv2_scale.checkpoint.weights_file import open_tensors
from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.load import load_config
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from fitv2_scale.model.counts import logical_shapes
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.world import join
from fitv2_scale.run.run import Run
from fitv2_scale.train.loop import train
from fitv2_scale.train.setup import claim
from tests.support.commits import commit_bytes, newest_commit, read_tensors
from tests.support.hostile_pickle import Touch
from tests.support.memory import peak_growth
from tests.support.ranks import run_ranks
from tests.support.repository import ROOT


def public(config, seed: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
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


def test_training_continues_from_imported_weights(tiny, tmp_path):
    config, file = tiny(train__steps=3), str(tmp_path / "weights.safetensors")
    weights = public(config)
    save_file(weights, file)
    import_weights(file, config.run, config)
    assert run_ranks(2, train, config) == [0, 0]
    found = read_tensors(config.run)
    for name, value in weights.items():
        moved = (found[f"param/{name}"] - value).abs().max()
        assert moved < 3e-3, name  # three warm-up steps at lr <= 3e-4
    assert Run.open(config.run).log.commits()[-1].fields["step"] == 3


def test_nothing_of_a_damaged_commit_remains_beside_imported_weights(tiny, tmp_path):
    """One bit of rank 1's file flips: rank 0 has read its own moments before all fall back to the weights."""
    config, file = tiny(train__steps=5), str(tmp_path / "weights.safetensors")
    save_file(public(config), file)
    import_weights(file, config.run, config)
    assert run_ranks(2, train, config) == [0, 0]
    undisturbed, damaged = commit_bytes(config.run), newest_commit(config.run) / "rank-00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    assert run_ranks(2, restored_state, config) == [(0, 0.0, 0.0)] * 2
    assert run_ranks(2, train, config) == [0, 0]
    assert commit_bytes(config.run) == undisturbed and newest_commit(config.run).name == "00000005.0003"


def test_tensors_that_are_parts_of_one_storage(tiny, tmp_path):
    """Transposed, or from the middle: as torch.load gives them."""
    file, whole = str(tmp_path / "w.bin"), torch.arange(60.0)
    saved = {"a": whole[7:19].view(3, 4), "b": whole[20:60:2], "c": whole[30:42].view(3, 4).T, "d": whole}
    torch.save(saved, file)
    found = {name: stored.read() for name, stored in open_tensors(file).tensors.items()}
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)


def restored_state(config) -> tuple[int, float, float]:
    """(step, sum of all moments, AdamW's count of steps) of what an attempt starts from."""
    with join() as world:
        engine = make_engine(config, Layout.of(world.size, 1), world)
        restored = restore(engine, Run.open(config.run), world)
        assert restored is not None and "step 5 is damaged" in restored.quarantined[0]
        moments = [b.tensor for n, t in engine.boxes().items() if n.startswith("exp_avg") for b in t.boxes]
        return restored.step, sum(float(m.abs().sum()) for m in moments), engine.scalars()["optimizer_step"]


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
    torch.save({"x": Touch(str(planted))}, bad)
    with pytest.raises(UserError, match="does not load as plain tensors"):
        import_weights(str(bad), config.run, config)
    assert not planted.exists()
    cut = tmp_path / "cut.safetensors"
    save_file(public(config), cut)
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a complete .safetensors file"):
        import_weights(str(cut), config.run, config)
    with pytest.raises(UserError, match="there is no weights file"):
        import_weights(str(tmp_path / "none.bin"), config.run, config)


@pytest.mark.parametrize(
    "parts,key",
    [
        (("model", "ema", "opt", "args"), "ema"),  # as the released script saves
        (("model", "ema", "opt"), "ema"),
        (("state_dict", "args"), "state_dict"),
        (("model", "opt"), "model"),
    ],
)
@pytest.mark.parametrize("suffix,protocol", [(".pt", 2), (".bin", 4)])
def test_of_a_training_checkpoint_its_weights_are_taken(tiny, tmp_path, parts, key, suffix, protocol, capfd):
    """With objects in it that torch.load refuses, or without. None of them is made."""
    config, file, planted = tiny(), str(tmp_path / f"dit{suffix}"), tmp_path / "planted"
    saved = {part: OrderedDict(public(config, seed)) for seed, part in enumerate(("ema", "model", "state_dict"))}
    opt = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    saved |= {"opt": [opt, Touch(str(planted))], "args": [Namespace(lr=1e-4), Touch(str(planted))]}
    torch.save({part: saved[part] for part in parts}, file, pickle_protocol=protocol)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert main(["checkpoint", "import", file, config.run, "--config", str(tmp_path / "config.yaml"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"run": config.run, "step": 0, "part": key, "layout": "fit"}
    found = read_tensors(config.run, "ema/")
    assert found.keys() == saved[key].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in saved[key].items())
    assert not planted.exists()


@pytest.mark.parametrize(
    "content,reason",
    [
        ({"step": 3}, r"does not load as plain tensors \('step' is a int\): it is refused"),
        (
            {"args": Namespace(lr=1)},
            r"does not load as plain tensors \('args' is a argparse.Namespace\)",
        ),
        ([torch.zeros(3)], r"does not load as plain tensors \(it holds a list\)"),
        ({3: torch.zeros(3)}, r"\(its keys are no names\)"),
    ],
)
def test_what_is_no_dictionary_of_tensors_is_named(tiny, tmp_path, content, reason):
    torch.save(content, tmp_path / "odd.bin")
    with pytest.raises(UserError, match=reason) as said:
        import_weights(str(tmp_path / "odd.bin"), tiny().run, tiny())
    assert "weights_only" not in str(said.value) and len(str(said.value)) < 200 + len(str(tmp_path))


def test_weights_that_are_not_finite_are_refused(tiny, tmp_path):
    config, weights = tiny(), public(tiny())
    first, second = sorted(weights)[:2]
    weights[first].view(-1)[:2] = torch.tensor([math.nan, -math.inf])
    weights[second].view(-1)[0] = math.inf
    save_file(weights, tmp_path / "nan.safetensors")
    said = rf"nan.safetensors: 3 values of 2 tensors are NaN or infinite \({first}, {second}\)"
    with pytest.raises(UserError, match=said):
        import_weights(str(tmp_path / "nan.safetensors"), config.run, config)
    assert not Path(config.run).exists()
    with pytest.raises(UserError, match=said):
        run_ranks(2, train, tiny(init_from=str(tmp_path / "nan.safetensors")))


@pytest.mark.parametrize("name", ["w.bin", "w", "w.safetensors.pt", "s3://bucket/w.bin"])
def test_an_export_has_the_suffix_of_its_format(two_step_run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{name}: weights are written as .safetensors, give a name that ends so"):
        export_weights(two_step_run, name, ema=True)
    assert not list(tmp_path.iterdir())


def test_runs_keep_absolute_paths(tiny, tmp_path, monkeypatch):
    """However they are made."""
    monkeypatch.chdir(tmp_path)
    paths = {"data__url": "data/mine", "sampling__vae": "vae"}
    config = tiny(**paths).model_copy(update={"run": "made"})
    save_file(public(config), "w.safetensors")
    imported = import_weights("w.safetensors", "imported", config).run
    with join() as world:
        trained = claim(config, Data.open(tiny(), (1,)).plan, None, world).run
    for run, name in ((imported, "imported"), (trained, "made")):
        places = run.config["run"], run.config["data"]["url"], run.config["sampling"]["vae"]
        assert places == (f"{tmp_path}/{name}", f"{tmp_path}/data/mine", f"{tmp_path}/vae")


def test_safetensors_under_another_suffix_are_read(tiny, tmp_path):
    """Earlier versions exported under any name."""
    config, weights = tiny(), public(tiny())
    save_file(weights, tmp_path / "w.bin")
    import_weights(str(tmp_path / "w.bin"), config.run, config)
    name = sorted(weights)[0]
    assert torch.equal(read_tensors(config.run)[f"param/{name}"], weights[name])


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


def growth_in_and_out(source: str, run: str, file: str, name: str) -> int:
    """Bytes by which a process grows that imports weights into a run and exports them again."""
    config = settings(name)

    def in_and_out() -> None:
        import_weights(source, run, config)
        export_weights(run, file, ema=True)

    return peak_growth(in_and_out)


def settings(name: str) -> Config:
    return load_config(str(ROOT / "configs" / f"{name}.yaml"), ["data.url=none", "train.steps=1"])


@pytest.mark.parametrize("name", ["fitv2_b2", pytest.param("fitv2_xl2", marks=pytest.mark.long)])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    """0.5 GB of weights, and 2.7 GB, in and out in the same extra memory: chunks under way, a tensor or two."""
    shapes = logical_shapes(settings(name).model)
    weights = {n: torch.full(shape, float(i)) for i, (n, shape) in enumerate(shapes.items())}
    torch.save(weights, tmp_path / "in.bin")
    for come, go in (("in.bin", "out.safetensors"), ("out.safetensors", "again.safetensors")):
        (extra,) = run_ranks(1, growth_in_and_out, *(str(tmp_path / file) for file in (come, f"run-{come}", go)), name)
        assert extra < 250e6
        (tmp_path / come).unlink()
    with safe_open(tmp_path / "again.safetensors", framework="pt") as opened:
        assert all(torch.equal(opened.get_tensor(n), weights[n]) for n in shapes)
