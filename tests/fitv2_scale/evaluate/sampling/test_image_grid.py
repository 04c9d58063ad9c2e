"""A grid of pictures, and the sizes that can be asked for."""

import io

import pytest
from PIL import Image

from data_sharding.errors import UserError
from fitv2_scale.config.model import parse_size
from fitv2_scale.evaluate.sampling.image_grid import grid_png


def test_grid_places_every_picture():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    pictures = [Image.new("RGB", size, c) for size, c in zip([(16, 8), (8, 8), (8, 16), (8, 8)], colours, strict=True)]
    grid = Image.open(io.BytesIO(grid_png(pictures, rows=2)))
    assert grid.size == (4 + 16 + 4 + 8 + 4, 4 + 8 + 4 + 16 + 4)
    assert [grid.getpixel(at) for at in ((6, 6), (26, 6), (10, 20), (26, 24))] == colours


@pytest.mark.parametrize("size", ["256", "100x100", "0x16", "16x-16", "axb", "16x16x16"])
def test_sizes_that_are_none(size):
    with pytest.raises(UserError, match="HEIGHTxWIDTH|at least 16"):
        parse_size(size)
