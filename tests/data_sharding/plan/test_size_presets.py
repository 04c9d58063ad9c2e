"""The presets' sizes, against the shares of ImageNet's training images that they stand for."""

from collections import Counter

import numpy as np
import pytest

from data_sharding.plan.size_presets import open_preset, pixel_sizes

# width, height: the share of the images, written down apart from the code.
COMMON = {(500, 375): 0.277, (375, 500): 0.075, (500, 333): 0.056, (333, 500): 0.021, (640, 480): 0.0225}
RARE = {(1600, 1200): 0.0105, (800, 600): 0.0105, (1024, 768): 0.009, (500, 334): 0.0075, (480, 640): 0.006}
RARE |= {(500, 500): 0.006, (400, 300): 0.006}


def test_shares_of_the_sizes():
    count = 200_000
    height, width = pixel_sizes(np.arange(count))
    found = Counter(zip(width.tolist(), height.tolist(), strict=True))
    for size, share in (COMMON | RARE).items():
        assert found[size] / count == pytest.approx(share, rel=0.15, abs=0.0015), size


@pytest.mark.parametrize("tokens", [256, 1024])
def test_a_preset_is_what_its_name_says(tokens):
    manifest = open_preset(f"preset:imagenet{tokens}", 5000)
    assert manifest.header.max_tokens == tokens
    assert manifest.size.astype(int).prod(-1).max() in range(tokens - 3, tokens + 1)
