"""The outline of a torch.save file's pickle, against what was saved."""

import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch

from fitv2_scale.checkpoint.pickle_outline import Opaque, TensorOutline, kind_of, outline


def outlined(saved, tmp_path, protocol):
    torch.save(saved, tmp_path / "w.bin", pickle_protocol=protocol)
    with zipfile.ZipFile(tmp_path / "w.bin") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return outline(archive.read(name))


def keys(tree):
    """A dictionary's keys, down to values that are none."""
    return {key: keys(value) for key, value in tree.items()} if isinstance(tree, dict) else None


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "saved",
    [
        {"a": torch.ones(2), "b": torch.ones(1)},
        OrderedDict(a=torch.ones(2)),
        {"ema": OrderedDict(x=torch.ones(1)), "step": 7, "args": {"lr": 0.1, "names": ["p", "q"]}, "none": None},
        {},
    ],
)
def test_the_keys_are_those_that_were_saved(saved, protocol, tmp_path):
    assert keys(outlined(saved, tmp_path, protocol)) == keys(saved)


@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_are_told_from_other_values(protocol, tmp_path):
    base = torch.arange(24.0).view(4, 6)
    saved = {
        "whole": base,
        "view": base.T[1:, 2:],
        "parameter": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "number": 3,
        "text": "x",
        "dtype": torch.float32,
        "list": [torch.ones(1)],
        "args": Namespace(lr=0.1),
    }
    found = outlined(saved, tmp_path, protocol)
    tensors = {name: value for name, value in found.items() if isinstance(value, TensorOutline)}
    assert tensors.keys() == {"whole", "view", "parameter"}
    whole, view, parameter = tensors.values()
    assert (whole.dtype, whole.offset, whole.shape, whole.strides) == ("torch.float32", 0, (4, 6), (6, 1))
    assert (view.storage, view.offset, view.shape, view.strides) == (whole.storage, 13, (5, 2), (1, 6))
    assert (parameter.dtype, parameter.shape) == ("torch.bfloat16", (3,)) and parameter.storage != whole.storage
    assert (found["number"], found["text"]) == (3, "x")
    assert isinstance(found["args"], Opaque) and kind_of(found["args"]) == "argparse.Namespace"


@pytest.mark.parametrize("pickled", [b"", b"\x80\x02", pickle.dumps(None)[:2] + b".", b"not a pickle"])
def test_what_is_no_pickle_is_refused(pickled):
    with pytest.raises((ValueError, IndexError)):
        outline(pickled)
