"""Decodes the image files of strangers: only the formats of the accepted suffixes; upright, in RGB with 8 bits.

Pillow knows dozens of formats, and some of them start other programs (EPS: Ghostscript). Which one is tried depends on
the bytes, not on the name, so the list is closed here. A file may have any of these formats under any accepted suffix:
ImageNet has a PNG named .JPEG.

Numbers of more than 8 bits are scaled by the maximum that the file declares. Where it declares none (floats, 32-bit and
signed integers), nothing says which value is white, and the image is left out rather than guessed.
"""

import io
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # Pillow's names; JPEG includes phones' MPO

_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANES, _SAMPLES = 258, 259, 262, 284, 339  # tags of TIFF


class UnreadableImage(Exception):
    """The bytes are not a complete image. The message is stored, so it contains no path and no address."""


class Decoded(NamedTuple):
    """An RGB image; ``first_of_several``: the file holds further frames or pages, which are not read."""

    image: Image.Image
    first_of_several: bool


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def load_rgb(data: bytes) -> Image.Image:
    """The image of ``decode``."""
    return decode(data).image


def decode(data: bytes) -> Decoded:
    """Decodes an image file, upright (EXIF) and in RGB; transparency becomes white. Raises UnreadableImage."""
    try:
        file = Image.open(io.BytesIO(data), formats=FORMATS)
        _refuse_unknown_scale(file)
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # Pillow would clip 16 bits to 255 instead of scaling them
            image = Image.fromarray(_eight_bits(np.asarray(image), file))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return Decoded(image.convert("RGB"), _has_several_frames(file))
    except (MemoryError, UnreadableImage):
        raise
    except Image.UnidentifiedImageError as error:  # its message contains an object's address
        raise UnreadableImage("not an image of a known format") from error
    except Exception as error:  # Pillow's decoders raise nearly any type on damaged bytes
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def _refuse_unknown_scale(file: Image.Image) -> None:
    """Raises UnreadableImage if nothing says which number is white, or if Pillow is known to read other pixels."""
    if isinstance(file, TiffImagePlugin.TiffImageFile):
        tags = file.tag_v2
        if 2 in tags.get(_SAMPLES, ()):
            raise UnreadableImage("its pixels are signed integers, of which no value is declared as white")
        if tags.get(_PLANES) == 2 and tags.get(_COMPRESSION, 1) == 1 and max(tags.get(_BITS, (1,))) > 8:
            raise UnreadableImage("its 16-bit channels lie in separate planes, which are not supported")
    if file.mode == "F":
        raise UnreadableImage("its pixels are floating-point numbers, of which no value is declared as white")
    if file.mode == "I" and file.format not in ("PPM", "PNG"):  # of these two, Pillow gives 16 bits in this mode
        raise UnreadableImage("its pixels are 32-bit integers, of which no value is declared as white")


def _eight_bits(pixels: np.ndarray, file: Image.Image) -> np.ndarray:
    """The upper 8 bits of 16-bit grey; of a TIFF of 12 bits, the upper 8 of these. Transparent pixels become white."""
    bits, white_is_zero = 16, False
    if isinstance(file, TiffImagePlugin.TiffImageFile):
        bits, white_is_zero = file.tag_v2.get(_BITS, (16,))[0], file.tag_v2.get(_PHOTOMETRIC) == 0
    grey = (pixels >> (bits - 8)).astype(np.uint8)
    if white_is_zero:  # which Pillow takes into account for 8 bits only
        grey = 255 - grey
    if isinstance(transparent := file.info.get("transparency"), int):
        grey[pixels == transparent] = 255
    return grey


def _has_several_frames(file: Image.Image) -> bool:
    """Asked after the first frame has been decoded: what follows may be damaged and does no harm."""
    with suppress(Exception):
        return file.format != "MPO" and bool(getattr(file, "is_animated", False))  # MPO: previews and depth maps
    return False
