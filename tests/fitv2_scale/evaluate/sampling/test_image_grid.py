"""A grid of pictures, and the sizes that can be asked for."""

import io

import numpy as np
import pytest
from PIL import Image

from data_sharding.errors import UserError
from data_sharding.format.dct import DctCodec
from fitv2_scale.config.model import parse_pixels, parse_size
from fitv2_scale.evaluate.sampling.image_grid import decode, grid_png, grid_requests
from tests.oracle.patches import tokens_of


def test_grid_places_every_picture():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    pictures = [Image.new("RGB", size, c) for size, c in zip([(16, 8), (8, 8), (8, 16), (8, 8)], colours, strict=True)]
    grid = Image.open(io.BytesIO(grid_png(pictures, rows=2)))
    assert grid.size == (4 + 16 + 4 + 8 + 4, 4 + 8 + 4 + 16 + 4)
    assert [grid.getpixel(at) for at in ((6, 6), (26, 6), (10, 20), (26, 24))] == colours


@pytest.mark.parametrize("size", ["256", "100x100", "0x16", "16x-16", "axb", "16x16x16"])
def test_sizes_that_are_none(size):
    with pytest.raises(UserError, match="HEIGHTxWIDTH|at least 16"):
        parse_size(size, 16)


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_a_picture_is_that_of_its_latent_whatever_the_patch(patch):
    codec, pixels = DctCodec(), np.random.default_rng(patch).integers(0, 256, (1, 64, 128, 3)).astype(np.uint8)
    latent = codec.encode(pixels)[0]
    np.testing.assert_array_equal(np.asarray(decode(tokens_of(latent, patch), codec)), codec.decode(latent))


def test_sizes_are_multiples_of_a_token():
    assert parse_size("192x320", 64) == (3, 5) and parse_size("192x320", 16) == (12, 20)
    assert parse_pixels("192x336") == (192, 336)
    assert [(r.rows, r.columns) for r in grid_requests(["64x128", "128x64"], [3], 64)] == [(1, 2), (2, 1)]
    for size in ("160x320", "64x32"):
        with pytest.raises(UserError, match=rf"size '{size}': give .* multiples of 64 \(a token\), as in 640x1280$"):
            parse_size(size, 64)
    with pytest.raises(UserError, match="size '0x64': each side needs at least 64 pixels"):
        parse_size("0x64", 64)
