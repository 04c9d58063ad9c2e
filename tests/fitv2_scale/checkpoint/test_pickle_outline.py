"""The keys of a torch.save file, against what was saved."""

import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from fitv2_scale.checkpoint.pickle_outline import TENSOR, outline


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
    torch.save(saved, tmp_path / "w.bin", pickle_protocol=protocol)
    assert keys(outline(str(tmp_path / "w.bin"))) == keys(saved)


@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_are_told_from_other_values(protocol, tmp_path):
    saved = {
        "a": torch.ones(2),
        "b": torch.nn.Parameter(torch.ones(1)),
        "c": 3,
        "d": torch.float32,
        "e": [torch.ones(1)],
    }
    torch.save(saved, tmp_path / "w.bin", pickle_protocol=protocol)
    found = outline(str(tmp_path / "w.bin"))
    assert [key for key, value in found.items() if value is TENSOR] == ["a", "b"]


def test_a_list_or_another_archive_has_no_keys(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "list.bin")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", b"x")
    with zipfile.ZipFile(tmp_path / "short.zip", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(None)[:2] + b".")
    assert [outline(str(tmp_path / name)) for name in ("list.bin", "other.zip", "short.zip")] == [None] * 3
