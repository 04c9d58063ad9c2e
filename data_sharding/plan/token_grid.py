"""The network's tokens: patches of latents, of 2 x 2 as they are stored or of several stored ones on a side.

What a plan chooses does not depend on them, so networks with other patches train on the same images. Lengths, packs
and work do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_sharding.format.codec import LATENT_CHANNELS
from data_sharding.format.patches import PATCH


@dataclass(frozen=True)
class TokenGrid:
    """How a network divides latents: into patches of ``patch`` latents on a side, a multiple of the stored 2."""

    patch: int = PATCH
    latent_channels: int = LATENT_CHANNELS

    def __post_init__(self):
        assert self.patch > 0 and self.patch % PATCH == 0, self.patch

    @property
    def channels(self) -> int:
        """Numbers of a token, in the order (c p1 p2)."""
        return self.latent_channels * self.patch**2

    @property
    def stored(self) -> int:
        """Stored tokens on a side of one of the network's."""
        return self.patch // PATCH

    def sizes(self, stored: np.ndarray | Sequence[int]) -> np.ndarray:
        """Rows and columns of views whose stored ones are ``stored`` (..., 2): int64 of that shape. What fills no patch
        is left out, so it is 0 for a side that is less than one."""
        return np.asarray(stored, np.int64) // self.stored

    def lengths(self, stored: np.ndarray) -> np.ndarray:
        """Tokens of views whose stored rows and columns are ``stored`` (..., 2): int64 (...)."""
        return self.sizes(stored).prod(-1)

    def longest(self, stored: int) -> int:
        """The most tokens that a view of at most so many stored ones can have."""
        return stored // self.stored**2

    def group(self, tokens: np.ndarray) -> np.ndarray:
        """Stored tokens (h, w, c*2*2) of a view as the network's, (rows, columns, c*p*p). Rows and columns of latents
        that fill no patch are left out at the bottom and at the right."""
        (rows, columns), side = self.sizes(tokens.shape[:2]).tolist(), self.stored
        whole = tokens[: rows * side, : columns * side].reshape(rows, side, columns, side, -1, PATCH, PATCH)
        # (row, down, column, across, c, p1, p2) -> (row, column, c, down, p1, across, p2)
        return whole.transpose(0, 2, 4, 1, 5, 3, 6).reshape(rows, columns, -1)


STORED_TOKENS = TokenGrid()  # of a codec with 4 channels, one by one
