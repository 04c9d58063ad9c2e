"""Patches of a latent, which are tokens; channels in FiT's order (c p1 p2). Datasets hold those of 2 x 2."""

import numpy as np

PATCH = 2  # latents on a side of a stored token
TOKEN_PIXELS = 8 * PATCH  # pixels on its side


def stored_channels(latent_channels: int) -> int:
    """Numbers of a stored token."""
    return latent_channels * PATCH**2


def patchify(latent: np.ndarray) -> np.ndarray:
    """(..., c, H, W) to (..., H/2, W/2, c*4), in einops "c (h p1) (w p2) -> h w (c p1 p2)"."""
    *lead, c, height, width = latent.shape
    split = latent.reshape(*lead, c, height // PATCH, PATCH, width // PATCH, PATCH)
    # (..., c, h, p1, w, p2) -> (..., h, w, c, p1, p2)
    moved = np.moveaxis(split, (-5, -4, -3, -2, -1), (-3, -5, -2, -4, -1))
    return moved.reshape(*lead, height // PATCH, width // PATCH, c * PATCH * PATCH)


def unpatchify(patches: np.ndarray, patch: int = PATCH) -> np.ndarray:
    """(..., h, w, c*patch*patch) to (..., c, h*patch, w*patch): for stored tokens the inverse of ``patchify``."""
    *lead, h, w, channels = patches.shape
    c = channels // patch**2
    split = patches.reshape(*lead, h, w, c, patch, patch)
    moved = np.moveaxis(split, (-3, -5, -2, -4, -1), (-5, -4, -3, -2, -1))
    return moved.reshape(*lead, c, h * patch, w * patch)
