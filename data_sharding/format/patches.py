"""2x2 patches of a latent, which are the model's tokens; channels in FiT's order (c p1 p2)."""

import numpy as np

PATCH = 2


def patchify(latent: np.ndarray) -> np.ndarray:
    """(..., c, H, W) to (..., H/2, W/2, c*4), in einops "c (h p1) (w p2) -> h w (c p1 p2)"."""
    *lead, c, height, width = latent.shape
    split = latent.reshape(*lead, c, height // PATCH, PATCH, width // PATCH, PATCH)
    # (..., c, h, p1, w, p2) -> (..., h, w, c, p1, p2)
    moved = np.moveaxis(split, (-5, -4, -3, -2, -1), (-3, -5, -2, -4, -1))
    return moved.reshape(*lead, height // PATCH, width // PATCH, c * PATCH * PATCH)


def unpatchify(patches: np.ndarray) -> np.ndarray:
    """(..., h, w, c*4) to (..., c, h*2, w*2): the inverse of ``patchify``."""
    *lead, h, w, channels = patches.shape
    c = channels // (PATCH * PATCH)
    split = patches.reshape(*lead, h, w, c, PATCH, PATCH)
    moved = np.moveaxis(split, (-3, -5, -2, -4, -1), (-5, -4, -3, -2, -1))
    return moved.reshape(*lead, c, h * PATCH, w * PATCH)
