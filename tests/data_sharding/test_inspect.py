"""The figures of a dataset as text and picture, from numbers written down."""

import numpy as np
import pytest
from PIL import Image

from data_sharding.errors import UserError
from data_sharding.inspect import _lengths, save_picture, to_text

LENGTHS = {
    "resize": {"images": 12, "mean": 3.25, "min": 2, "max": 6, "counts": [4, 8, 0]},
    "crop": {"images": 0, "mean": None, "min": None, "max": None, "counts": [0, 0, 0]},
}
FIGURES = {
    "url": "/data/set", "digest": "0123456789abcdef01", "samples": 12, "skipped": 1, "bytes": 2_500_000, "frames": 3,
    "shards": 2, "codec": {"name": "dct", "digest": "fedcba98765432100"}, "dtype": "float16", "max_tokens": 9,
    "mean_length_mixed": 3.25, "images_per_class": {"ant": 5, "bee": 7}, "bin_edges": [1, 4, 7, 10], "lengths": LENGTHS,
}  # fmt: skip


def test_the_text():
    assert to_text(FIGURES).splitlines() == [
        "/data/set  (0123456789abcdef)",
        "  12 images of 2 classes (5 to 7 each), 1 skipped",
        "  2.5 MB in 3 frames, 2 shards",
        "  codec dct (fedcba9876543210), float16, at most 9 tokens, mean 3.2 with views mixed",
        "  resize: 12 images, 2 to 6 tokens, mean 3.2",
        f"        1-3     {'█' * 25:50} 4",
        f"        4-6     {'█' * 50} 8",
        "  crop: none",
    ]


def test_the_picture(tmp_path):
    save_picture(FIGURES, str(tmp_path / "a.png"))
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (960, 480)
    with pytest.raises(UserError, match="there is no folder .*/none, make it first"):
        save_picture(FIGURES, str(tmp_path / "none/a.png"))
    with pytest.raises(UserError, match="cannot write .*a.xyz"):
        save_picture(FIGURES, str(tmp_path / "a.xyz"))


def test_lengths_are_counted_by_bins():
    edges = np.array([1, 4, 7, 10])
    assert _lengths(np.array([1, 3, 4, 6, 9]), edges) == {
        "images": 5, "mean": 4.6, "min": 1, "max": 9, "counts": [2, 2, 1]
    }  # fmt: skip
    assert _lengths(np.array([]), edges) == LENGTHS["crop"]
