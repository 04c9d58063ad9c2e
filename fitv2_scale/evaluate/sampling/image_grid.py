"""Decodes latents to images, and arranges images in a grid, as a run does at intervals."""

import io
from math import isqrt

import numpy as np
from PIL import Image

from data_sharding.format.codec import Codec
from data_sharding.format.patches import unpatchify
from fitv2_scale.config.model import parse_size
from fitv2_scale.evaluate.sampling.sampler import ImageRequest

_GAP = 4  # pixels between the images of a grid


def evenly_spaced_labels(columns: int, classes: int) -> list[int]:
    """At most ``columns`` labels, evenly spaced over ``classes``."""
    columns = min(columns, classes)
    return [i * classes // columns for i in range(columns)]


def grid_requests(sizes: list[str], labels: list[int], pixels_per_token: int) -> list[ImageRequest]:
    """One row for each size (as in "160x320"), one column for each label, in tokens of so many pixels a side."""
    return [
        ImageRequest(row * len(labels) + column, label, *parse_size(size, pixels_per_token))
        for row, size in enumerate(sizes)
        for column, label in enumerate(labels)
    ]


def decode(tokens: np.ndarray, codec: Codec) -> Image.Image:
    """The RGB image of latent tokens (rows, columns, C), of patches of any side p: C is the codec's channels times
    p squared."""
    return Image.fromarray(codec.decode(unpatchify(tokens, isqrt(tokens.shape[-1] // codec.channels))))


def grid_png(images: list[Image.Image], rows: int) -> bytes:
    """A PNG of the images in ``rows`` equal rows, each centred in a cell for the largest of its row and column."""
    columns = len(images) // rows
    grid_rows = [images[i * columns : (i + 1) * columns] for i in range(rows)]
    heights = [max(image.height for image in row) for row in grid_rows]
    widths = [max(row[c].width for row in grid_rows) for c in range(columns)]
    size = (sum(widths) + _GAP * (columns + 1), sum(heights) + _GAP * (rows + 1))
    grid, top = Image.new("RGB", size, "white"), _GAP
    for row, height in zip(grid_rows, heights, strict=True):
        left = _GAP
        for image, width in zip(row, widths, strict=True):
            grid.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
            left += width + _GAP
        top += height + _GAP
    out = io.BytesIO()
    grid.save(out, "PNG")
    return out.getvalue()
