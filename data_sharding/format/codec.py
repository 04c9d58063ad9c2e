"""What a codec is: pixels to latents of an eighth of their side, and back. The model sees latents only.

``dct`` and ``sd_vae`` hold the two that there are, ``codecs`` chooses.
"""

from typing import Literal, NamedTuple, Protocol

import numpy as np

Latent = Literal["mean", "sample"]


class Draw(NamedTuple):
    """Names the random numbers of one encoding: an image's ``id``, and which of its pictures (2 * view + flip)."""

    id: int
    picture: int


class Codec(Protocol):
    """What the writer and the sampler need of a codec.

    ``digest`` stands for weights and arithmetic: two codecs of one digest give the same latents. ``scale`` is the
    factor that ``encode`` has already multiplied into its latents (0.18215 for SD-VAE), and ``decode`` divides out.
    """

    name: str
    digest: str
    scale: float
    downsample: int
    channels: int
    batch_pixels: int  # about how many pixels to encode in one call

    @property
    def record(self) -> dict[str, str | float]:
        """What the manifest says of it: name, digest, scale, and what else ``codec_of`` wants to know."""
        ...

    def encode(self, pixels: np.ndarray, draws: list[Draw]) -> np.ndarray:
        """uint8 (B, H, W, 3), sides multiples of 16, to float32 (B, channels, H/downsample, W/downsample), variance ~1.

        The random numbers of picture b, of a codec that has any, are those of ``draws[b]``.
        """
        ...

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """float (channels, h, w) to uint8 (h*downsample, w*downsample, 3)."""
        ...


SD_VAE = "sd-vae"
