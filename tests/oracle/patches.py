"""Tokens of larger patches from stored ones, number by number."""

import numpy as np


def latent_of(stored: np.ndarray) -> np.ndarray:
    """The latent (c, 2 rows, 2 columns) of stored tokens (rows, columns, 4 c), each a patch of 2 x 2, in the order
    (channel, row, column)."""
    rows, columns, numbers = stored.shape
    latent = np.empty((numbers // 4, 2 * rows, 2 * columns), stored.dtype)
    for r in range(rows):
        for q in range(columns):
            for k in range(numbers // 4):
                for a in (0, 1):
                    for b in (0, 1):
                        latent[k, 2 * r + a, 2 * q + b] = stored[r, q, 4 * k + 2 * a + b]
    return latent


def tokens_of(latent: np.ndarray, patch: int) -> np.ndarray:
    """Patches (rows, columns, c * patch * patch) of a latent (c, height, width), in the same order, from its top and
    left; what fills none is left out."""
    channels, height, width = latent.shape
    tokens = np.empty((height // patch, width // patch, channels * patch * patch), latent.dtype)
    for r in range(len(tokens)):
        for q in range(tokens.shape[1]):
            for k in range(channels):
                for a in range(patch):
                    for b in range(patch):
                        tokens[r, q, patch * patch * k + patch * a + b] = latent[k, patch * r + a, patch * q + b]
    return tokens
