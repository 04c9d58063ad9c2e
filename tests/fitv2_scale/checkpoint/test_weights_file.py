"""What is no file of weights, or holds them below something else, is named with what to do."""

import argparse
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from data_sharding.errors import UserError
from fitv2_scale.checkpoint.weights import open_weights
from fitv2_scale.checkpoint.weights_file import open_tensors
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.counts import logical_shapes

MODEL = ModelConfig(depth=1, hidden=16, heads=2, classes=3)


def refused(file) -> str:
    with pytest.raises(UserError) as said:
        open_tensors(str(file))
    assert "weights_only" not in str(said.value) and "\n" not in str(said.value)
    return str(said.value).removeprefix(str(file))


@pytest.mark.parametrize(
    "data,said",
    [
        (b"<!DOCTYPE html><html>404</html>", "it begins with '<!DOCTYPE html><html': fetch it again"),
        (b"", "it begins with '': fetch it again"),
        (bytes(range(128, 228)), "fetch it again"),
    ],
)
def test_what_is_no_file_of_weights(tmp_path, data, said):
    (tmp_path / "w.pt").write_bytes(data)
    sentence = refused(tmp_path / "w.pt")
    assert sentence.startswith(" is no file of torch.save or safetensors, ") and said in sentence


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_format_before_torch_1_6(tmp_path, protocol):
    former = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": False}
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pt", **former)
    torch.save({"a": torch.ones(2)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-30])
    assert refused(tmp_path / "w.pt").startswith(" is in the format of torch before 1.6: load it with torch, save it")
    assert refused(tmp_path / "cut.pt") == " is not complete: fetch it again"


def test_a_program_is_no_file_of_weights(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), tmp_path / "net.pt")
    assert refused(tmp_path / "net.pt") == " is a TorchScript program: save its state_dict() and give that file"


@pytest.mark.parametrize(
    "pickled,reason",
    [
        (pickle.dumps({"a": 3}, 4), "'a' is a int"),
        (pickle.dumps(3, 0), "it holds a int"),
        (pickle.dumps({"a": os.getcwd}, 2), "'a' is a posix.getcwd"),
        (pickle.dumps({"a": argparse.Namespace()}, 2), "'a' is a argparse.Namespace"),
        (pickle.dumps({"a": [1]}, 2), "'a' is a list"),
    ],
)
def test_what_a_pickle_holds_instead_is_told(tmp_path, pickled, reason):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        for name, data in {"data.pkl": pickled, "version": b"3\n"}.items():
            archive.writestr(f"w/{name}", data)
    assert refused(tmp_path / "w.pt") == f" does not load as plain tensors ({reason}): it is refused"


TENSORS = {"a": torch.ones(2), "b": torch.ones(1)}
OTHERS = {"a": torch.zeros(2), "c": torch.zeros(1)}


@pytest.mark.parametrize(
    "saved,part",
    [
        ({"weights": TENSORS, "optimizer": {"lr": 0.1, "state": {"a": {"exp_avg": torch.ones(2)}}}}, "weights"),
        ({"trainer": {"net": TENSORS, "step": 3}}, "trainer.net"),
        ({"weights": OTHERS, "ema": TENSORS}, "ema"),
        ({"ema": {"decay": 0.9, "shadow": TENSORS}, "model": OTHERS}, "ema.shadow"),
        (TENSORS, ""),
    ],
)
def test_the_part_of_a_training_checkpoint(tmp_path, saved, part):
    torch.save(saved, tmp_path / "w.pt")
    found = open_tensors(str(tmp_path / "w.pt"))
    assert found.part == part and found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[name].read(), tensor) for name, tensor in TENSORS.items())


def test_of_several_parts_none_is_chosen(tmp_path):
    torch.save({"one": TENSORS, "step": torch.ones(()), "two": OTHERS}, tmp_path / "w.pt")
    said = " is a training checkpoint: its weights lie under 'one' or 'two'; save these alone as .safetensors"
    assert refused(tmp_path / "w.pt").startswith(said)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_wrappers_put_before_every_name_is_left_out(tmp_path, prefix, suffix):
    """As DistributedDataParallel and torch.compile do."""
    weights = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(logical_shapes(MODEL).items())}
    file = str(tmp_path / f"w{suffix}")
    (save_file if suffix == ".safetensors" else torch.save)({f"{prefix}{n}": w for n, w in weights.items()}, file)
    found = open_weights(file, MODEL).tensors
    assert found.keys() == weights.keys() and all(torch.equal(found[n].read(), w) for n, w in weights.items())


def test_a_prefix_of_some_names_stays(tmp_path):
    weights = {f"module.{name}": torch.zeros(shape) for name, shape in logical_shapes(MODEL).items()}
    first = min(weights)
    weights[first.removeprefix("module.")] = weights.pop(first)
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"are left over \(module\."):
        open_weights(str(tmp_path / "w.pt"), MODEL)
