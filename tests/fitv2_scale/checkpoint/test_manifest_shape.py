"""A commit's manifest that contradicts itself is refused, whatever its digest says."""

import copy
import json

import pytest

from fitv2_scale.checkpoint.manifest_shape import manifest_of
from tests.support.repository import ROOT

STEPS = ROOT / "tests/fixtures/made_by_a2e80d5/run/steps"
STORED = json.loads(next(STEPS.glob("*/manifest.json")).read_text())
# A tensor of two rows, a box each, in a file of 100 bytes.
BOXES = [{"offset": [row, 0], "shape": [1, 3], "file": "a.bin", "begin": 12 * row} for row in (0, 1)]
MANIFEST = STORED | {
    "files": {"a.bin": {"bytes": 100, "xxh3_128": ["00"]}},
    "tensors": {"param/w": {"shape": [2, 3], "boxes": BOXES}},
}


def test_manifests_that_were_written_are_accepted():
    assert manifest_of(STORED) is STORED and manifest_of(MANIFEST) is MANIFEST


@pytest.mark.parametrize(
    "box,said",
    [
        ({"offset": [2, 0]}, "a box of param/w ends outside of it"),
        ({"offset": [1, 1]}, "a box of param/w ends outside of it"),
        ({"offset": [1]}, "a box of param/w has another number of dimensions"),
        ({"begin": 89}, "a box of param/w is not in its file"),  # 12 bytes from there on end behind 100
        ({"file": "b.bin"}, "a box of param/w is not in its file"),
        ({"shape": [1, 2]}, "the boxes of param/w are not all of it"),
    ],
)
def test_a_box_that_does_not_fit_is_named(box, said):
    manifest = copy.deepcopy(MANIFEST)
    manifest["tensors"]["param/w"]["boxes"][1] |= box
    with pytest.raises(ValueError, match=said):
        manifest_of(manifest)


def test_the_last_byte_of_a_file_may_be_used():
    manifest = copy.deepcopy(MANIFEST)
    manifest["tensors"]["param/w"]["boxes"][1]["begin"] = 88
    assert manifest_of(manifest) is manifest


@pytest.mark.parametrize("digests", [[], ["00", "00"]])
def test_each_chunk_of_a_file_has_its_digest(digests):
    manifest = copy.deepcopy(MANIFEST)
    manifest["files"]["a.bin"]["xxh3_128"] = digests
    with pytest.raises(ValueError, match=f"a.bin has {len(digests)} digests for 100 bytes"):
        manifest_of(manifest)
