"""What a rank reads of a commit that others wrote: any boxes, of any boxes."""

import json

import numpy as np
import pytest
import torch

from data_sharding.storage.local_store import LocalStore
from fitv2_scale.checkpoint.checksums import Damaged
from fitv2_scale.checkpoint.commit_files import CommitReader, box_record, file_record, write_manifest
from fitv2_scale.checkpoint.safetensors_file import TensorToWrite, write_safetensors
from fitv2_scale.parallel.boxes import Box, LogicalTensor

VALUES = torch.arange(7 * 9, dtype=torch.float32).view(7, 9)
STORED = [((0, 0), (3, 9)), ((3, 0), (4, 5)), ((3, 5), (4, 4))]


def part(offset, shape) -> torch.Tensor:
    return VALUES[offset[0] : offset[0] + shape[0], offset[1] : offset[1] + shape[1]]


@pytest.fixture
def commit(tmp_path):
    """A store with VALUES in three boxes, and its manifest."""
    store = LocalStore(str(tmp_path))
    entries = [TensorToWrite(str(o), torch.float32, s, lambda o=o, s=s: part(o, s)) for o, s in STORED]
    entries.append(TensorToWrite("s", torch.float32, (), lambda: torch.tensor(2.5)))
    written = write_safetensors(store, "c/f.safetensors", entries)
    boxes = [box_record(o, s, "f.safetensors", written.begins[str(o)]) for o, s in STORED]
    scalar = [box_record((), (), "f.safetensors", written.begins["s"])]
    tensors = {"w": {"shape": [7, 9], "boxes": boxes}, "s": {"shape": [], "boxes": scalar}}
    write_manifest(store, "c", {}, {"f.safetensors": file_record(written)}, json.dumps(tensors).encode())
    return store, json.loads(store.read("c/manifest.json"))


@pytest.mark.parametrize("seed", range(20))
def test_any_box_is_read_from_any_boxes(commit, seed):
    rng, boxes = np.random.default_rng(seed), []
    for _ in range(3):
        offset = tuple(int(rng.integers(n)) for n in (7, 9))
        shape = tuple(int(rng.integers(n - o)) + 1 for n, o in zip((7, 9), offset, strict=True))
        room = torch.full((shape[0], shape[1] + 2), -1.0)
        boxes.append(Box(offset, room[:, : shape[1]]))  # strided
    scalar = torch.zeros(())
    state = {"w": LogicalTensor((7, 9), boxes), "s": LogicalTensor((), [Box((), scalar)])}
    CommitReader(commit[0], "c", commit[1]).read(state)
    assert all(torch.equal(box.tensor, part(box.offset, box.tensor.shape)) for box in boxes) and scalar == 2.5


def test_what_no_stored_box_holds_is_damage(commit):
    store, manifest = commit
    del manifest["tensors"]["w"]["boxes"][1]
    state = {"w": LogicalTensor((7, 9), [Box((0, 4), torch.full((7, 2), -1.0))])}
    with pytest.raises(Damaged, match="the manifest's boxes of w are not all of it"):
        CommitReader(store, "c", manifest).read(state)
    CommitReader(store, "c", manifest).read({"w": LogicalTensor((7, 9), [Box((0, 5), torch.zeros(7, 4))])})


def test_a_tensor_of_another_shape_is_refused(commit):
    with pytest.raises(ValueError, match=r"w has shape \[7, 9\] in the commit, \[9, 7\] in the network"):
        CommitReader(commit[0], "c", commit[1]).read({"w": LogicalTensor((9, 7), [Box((0, 0), torch.zeros(9, 7))])})
