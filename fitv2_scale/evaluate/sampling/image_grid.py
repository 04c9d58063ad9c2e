"""Latents to pictures: single ones, and the grid that a run shows every so often."""

import io

import numpy as np
from PIL import Image

from data_sharding.format.codec import Codec
from data_sharding.format.patches import unpatchify
from fitv2_scale.config.model import parse_size
from fitv2_scale.evaluate.sampling.sampler import Request

_GAP = 4  # pixels between the pictures of a grid


def spread_labels(columns: int, classes: int) -> list[int]:
    """At most ``columns`` labels, spread evenly over ``classes``."""
    columns = min(columns, classes)
    return [i * classes // columns for i in range(columns)]


def grid_requests(sizes: list[str], labels: list[int]) -> list[Request]:
    """One row a size (as in "160x320"), one column a label."""
    return [
        Request(row * len(labels) + column, label, *parse_size(size))
        for row, size in enumerate(sizes)
        for column, label in enumerate(labels)
    ]


def decode(tokens: np.ndarray, codec: Codec) -> Image.Image:
    """(rows, columns, 16) latent tokens to an RGB picture."""
    return Image.fromarray(codec.decode(unpatchify(tokens)))


def grid_png(pictures: list[Image.Image], rows: int) -> bytes:
    """The pictures in ``rows`` equal rows, each centred in a cell as large as the largest of its row and column."""
    columns = len(pictures) // rows
    grid_rows = [pictures[i * columns : (i + 1) * columns] for i in range(rows)]
    heights = [max(p.height for p in row) for row in grid_rows]
    widths = [max(row[c].width for row in grid_rows) for c in range(columns)]
    size = (sum(widths) + _GAP * (columns + 1), sum(heights) + _GAP * (rows + 1))
    grid, top = Image.new("RGB", size, "white"), _GAP
    for row, height in zip(grid_rows, heights, strict=True):
        left = _GAP
        for picture, width in zip(row, widths, strict=True):
            grid.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
            left += width + _GAP
        top += height + _GAP
    out = io.BytesIO()
    grid.save(out, "PNG")
    return out.getvalue()
