"""Patches of 2x2 latent positions, the model's tokens."""

import numpy as np

from data_sharding.format.patches import patchify, unpatchify


def test_patchify_is_channels_then_rows_then_columns():
    latent = np.random.default_rng(0).standard_normal((4, 6, 10))
    tokens = patchify(latent)
    assert tokens.shape == (3, 5, 16)
    for c, p1, p2, h, w in np.ndindex(4, 2, 2, 3, 5):
        assert tokens[h, w, c * 4 + p1 * 2 + p2] == latent[c, 2 * h + p1, 2 * w + p2]
    np.testing.assert_array_equal(unpatchify(tokens), latent)
    both = np.stack([latent, -latent])
    np.testing.assert_array_equal(patchify(both)[1], -tokens)
    np.testing.assert_array_equal(unpatchify(patchify(both)), both)
