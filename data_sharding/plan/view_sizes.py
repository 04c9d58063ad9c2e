"""The view that an image is trained on, and its size; images that are too small for the patch of a network."""

import numpy as np

from data_sharding.errors import UserError
from data_sharding.format.columns import blocks
from data_sharding.format.manifest import Manifest
from data_sharding.format.patches import TOKEN_PIXELS
from data_sharding.plan.token_grid import TokenGrid
from data_sharding.plan.view_choice import Views
from data_sharding.rng import Purpose, words

RESIZE, CROP = 0, 1  # the view axis of Manifest.size


def choose_views(
    manifest: Manifest, views: Views, seed: int, epoch: np.ndarray, row: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """View, int64 (n,), and stored size, int64 (n, 2), of each image: if a crop exists, ``mixed`` takes it with
    probability 1/2."""
    size = manifest.size[row].astype(np.int64)  # (n, view, 2)
    crop = size[:, CROP].prod(-1) > 0
    if views == "mixed":
        crop &= (words(seed, Purpose.VIEW, epoch, ids) & 1) == 1
    elif views == "resize":
        crop &= False
    view = np.where(crop, CROP, RESIZE)
    return view, size[np.arange(len(view)), view]


def require_a_token(manifest: Manifest, views: Views, token_grid: TokenGrid) -> None:
    """Raises UserError if a view that ``views`` may choose is less than a patch on a side. Reads all sizes, if the
    patch is larger than that of stored tokens, of which every view has one."""
    if token_grid.stored == 1:
        return
    counts = np.sum([(0, 0), *(_too_small(size, views, token_grid) for size in blocks(manifest.size))], axis=0)
    count, with_views_crop = counts.tolist()
    if not count:
        return
    pixels = TOKEN_PIXELS * token_grid.stored
    remedy = "" if with_views_crop else "set data.views=crop, or "
    raise UserError(
        f"{count:,} of the {len(manifest.size):,} images of {manifest.url} are less than one patch of {pixels} x "
        f"{pixels} pixels on a side in a view that is trained on: {remedy}give a dataset with larger images"
    )


def _too_small(size: np.ndarray, views: Views, token_grid: TokenGrid) -> tuple[int, int]:
    """How many of the images of ``size`` (n, view, 2) have such a view, with ``views`` and with views=crop."""
    crop = size[:, CROP].min(-1) > 0
    small = token_grid.sizes(size).min(-1) < 1
    cropped = np.where(crop, small[:, CROP], small[:, RESIZE])
    chosen = {"mixed": cropped | small[:, RESIZE], "resize": small[:, RESIZE], "crop": cropped}[views]
    return int(chosen.sum()), int(cropped.sum())
