"""Datasets that consist of sizes only: `fitv2 plan` and `fitv2 bench data` use them before the real one exists.

``preset:imagenet256`` and ``preset:imagenet1024`` stand for ImageNet's 1,281,167 training images at 256 and at 1,024
tokens. There is no published table of ImageNet's sizes; the fractions below are our estimate, after its
well-known modes (above all 500 x 375), not a count. The result: mean lengths of 246 and 704 tokens with views mixed,
most images at a few lengths (256, 234, 247; 713, 620, 972), and few small ones.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from data_sharding.errors import UserError
from data_sharding.format.manifest import Header, Manifest
from data_sharding.rng import Purpose, uniform

PREFIX = "preset:"
IMAGENET_IMAGES = 1_281_167
_MAX_TOKENS = {"imagenet256": 256, "imagenet1024": 1024}
_FRAME_IMAGES = 64
_CLASSES = 1000
_CHUNK = 1 << 20  # images drawn at once

# width, height, fraction of the images
_MODES = np.array(
    [
        (500, 375, 0.277),
        (375, 500, 0.075),
        (500, 333, 0.056),
        (333, 500, 0.021),
        (640, 480, 0.0225),
        (1600, 1200, 0.0105),
        (800, 600, 0.0105),
        (1024, 768, 0.009),
        (500, 334, 0.0075),
        (480, 640, 0.006),
        (500, 500, 0.006),
        (400, 300, 0.006),
    ]
)
# The rest: Flickr's long side of 500 at any aspect up to 2.2, larger pictures, medium ones, thumbnails.
_FLICKR, _LARGE, _MEDIUM = 0.263, 0.155, 0.072


def is_preset(url: str) -> bool:
    """Whether ``url`` names a preset (known or not), not a dataset."""
    return url.startswith(PREFIX)


def open_preset(url: str, images: int = IMAGENET_IMAGES) -> Manifest:
    """A manifest in memory with the preset's sizes and no shards. Raises UserError for a name that is not known."""
    name = url.removeprefix(PREFIX)
    if name not in _MAX_TOKENS:
        raise UserError(f"there is no {url}: the presets are {', '.join(PREFIX + known for known in _MAX_TOKENS)}")
    max_tokens = _MAX_TOKENS[name]
    size = np.empty((images, 2, 2), np.uint16)
    for start in range(0, images, _CHUNK):
        ids = np.arange(start, min(images, start + _CHUNK))
        size[start : start + len(ids)] = token_sizes(*pixel_sizes(ids), max_tokens)
    return sizes_only(url, size, max_tokens)


def sizes_only(url: str, size: np.ndarray, max_tokens: int) -> Manifest:
    """A manifest of images of ``size`` (uint16 (N, 2, 2), as Manifest.size), 64 a frame, classes in turn."""
    images = len(size)
    first = np.minimum(np.arange(-(-images // _FRAME_IMAGES) + 1) * _FRAME_IMAGES, images)
    header = Header(
        codec={"name": "dct", "digest": url, "scale": 1.0},
        dtype="float16",
        max_tokens=max_tokens,
        classes=tuple(f"class {i}" for i in range(_CLASSES)),
        shards=(),
        columns={},
        totals={},
        source={"digest": url, "images_per_shard": 0, "holdout": 0.0},
    )
    empty = np.empty(0, np.int64)
    return Manifest(
        url=url,
        digest=f"{url} of {images}",
        header=header,
        frame_shard=empty,
        frame_offset=empty,
        frame_bytes=empty,
        frame_raw_bytes=empty,
        frame_digest=empty,
        frame_first=first,
        sample_id=np.arange(images),
        label=np.arange(images, dtype=np.int32) % _CLASSES,
        size=size,
    )


def pixel_sizes(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Height and width in pixels of each image: int64."""
    draw: Callable[[int], np.ndarray] = partial(uniform, 0, Purpose.PRESET, 0, ids)
    edges = np.cumsum([*_MODES[:, 2], _FLICKR, _LARGE, _MEDIUM])
    kind = np.searchsorted(edges, draw(0), side="right")
    mode = np.minimum(kind, len(_MODES) - 1)
    width, height = _MODES[mode, 0].copy(), _MODES[mode, 1].copy()

    gauss = np.sqrt(-2 * np.log1p(-draw(2))) * np.cos(2 * np.pi * draw(3))
    aspect = np.exp(0.25 + 0.25 * np.sqrt(-2 * np.log1p(-draw(4))) * np.cos(2 * np.pi * draw(5))).clip(0.4, 2.5)
    flickr, large, medium, small = (kind == len(_MODES) + i for i in range(4))
    short, landscape = 500 / 2.2 ** draw(1), draw(6) < 0.75
    width[flickr] = np.where(landscape, 500, short)[flickr]
    height[flickr] = np.where(landscape, short, 500)[flickr]
    for chosen, side in (
        (large, np.clip(640 * np.exp(0.45 * gauss), 340, 4000)),
        (medium, 256 + 84 * draw(1)),
        (small, 100 + 156 * draw(1)),
    ):
        width[chosen], height[chosen] = (side * aspect**0.5)[chosen], (side / aspect**0.5)[chosen]
    return np.rint(height).astype(np.int64), np.rint(width).astype(np.int64)


def token_sizes(height: np.ndarray, width: np.ndarray, max_tokens: int) -> np.ndarray:
    """FiT's two views of images in pixels, in tokens: uint16 (N, 2, 2) as Manifest.size (``views.resize_tokens``,
    vectorised)."""
    most = 256 * max_tokens  # pixels
    shrink = np.where(height * width >= most, np.sqrt(most / (height * width)), 1.0)
    # A side that is a whole number of tokens may come out slightly below it in floating point.
    rows, columns = (np.maximum(np.floor(side * shrink / 16 + 1e-9), 1) for side in (height, width))
    side = int(max_tokens**0.5)
    crop = np.where((height > 16 * side) & (width > 16 * side), side, 0)
    return np.stack((np.stack((rows, columns), -1), np.stack((crop, crop), -1)), 1).astype(np.uint16)
