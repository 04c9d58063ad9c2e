"""The interface of a codec: pixels to latents of an eighth of their side, and back. The model sees latents only.

``dct`` and ``sd_vae`` implement it; ``codecs`` chooses one.
"""

from typing import Literal, NamedTuple, NotRequired, Protocol, TypedDict

import numpy as np

Latent = Literal["mean", "sample"]
LATENT_CHANNELS = 4  # of a codec whose record names no number


class Draw(NamedTuple):
    """The key of one encoding's random numbers: an image's ``id``, and which of its pictures (2 * view + flip)."""

    id: int
    picture: int


class CodecRecord(TypedDict):
    """A codec in the manifest. sd-vae adds ``latent``, and in ``vae`` the digest of its weights if that is known.
    ``channels`` are those of its latents, left out if they are 4, as all were that earlier versions wrote."""

    name: str
    digest: str
    scale: float
    latent: NotRequired[str]
    vae: NotRequired[str]
    channels: NotRequired[int]


def channels_of(record: CodecRecord) -> int:
    """Channels of the latents. Raises ValueError if ``record`` gives no whole number above 0."""
    channels = record.get("channels", LATENT_CHANNELS)
    if type(channels) is not int or channels < 1:
        raise ValueError(f"the codec has {channels!r} channels")
    return channels


class Codec(Protocol):
    """The interface that the writer and the sampler use.

    ``digest`` covers weights and arithmetic: two codecs with the same digest give the same latents. ``scale`` is the
    factor that ``encode`` has already multiplied into its latents (0.18215 for SD-VAE), and ``decode`` divides out.
    """

    name: str
    scale: float
    downsample: int
    channels: int
    batch_pixels: int  # about how many pixels to encode in one call

    @property
    def digest(self) -> str: ...

    @property
    def record(self) -> CodecRecord:
        """The manifest's record of it: name, digest, scale, and whatever else ``codec_of`` needs."""
        ...

    def encode(self, pixels: np.ndarray, draws: list[Draw]) -> np.ndarray:
        """uint8 (B, H, W, 3), sides multiples of 16, to float32 (B, channels, H/downsample, W/downsample), variance ~1.

        A codec that draws random numbers takes those of ``draws[b]`` for picture b.
        """
        ...

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """float (channels, h, w) to uint8 (h*downsample, w*downsample, 3)."""
        ...


SD_VAE = "sd-vae"
PUBLISHED = "published sd-vae-ft-ema latents"  # in place of the digest: their weights came without one
