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

_BITS, _COMPRESSION, _PHOTOMETRIC, _MAXIMUM, _PLANES, _SAMPLES = 258, 259, 262, 281, 284, 339  # tags of TIFF


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
        elif most := _declared_maximum(file):
            image = _stretched(image, most)
        if file.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getbbox() is None:
            image = image.convert("RGB")  # screenshots of Windows have 0 in the fourth byte, which is no alpha
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
        # Of colours, Pillow keeps the upper 8 bits alone.
        if file.mode[0] != "I" and max(tags.get(_BITS, (1,))) > 8 and (most := _declared_maximum(file)):
            raise UnreadableImage(f"its 16-bit colours end at {most}, which is not supported")
    if file.mode == "F":
        raise UnreadableImage("its pixels are floating-point numbers, of which no value is declared as white")
    if file.mode == "I" and file.format not in ("PPM", "PNG"):  # of these two, Pillow gives 16 bits in this mode
        raise UnreadableImage("its pixels are 32-bit integers, of which no value is declared as white")


def _eight_bits(pixels: np.ndarray, file: Image.Image) -> np.ndarray:
    """The upper 8 bits of 16-bit grey; of a TIFF of 12 bits, the upper 8 of these; of one that declares a maximum,
    what is scaled by it. Transparent pixels become white."""
    bits, white_is_zero = 16, False
    if isinstance(file, TiffImagePlugin.TiffImageFile):
        bits, white_is_zero = file.tag_v2.get(_BITS, (16,))[0], file.tag_v2.get(_PHOTOMETRIC) == 0
    most = _declared_maximum(file)
    if most and pixels.max() <= most:
        grey = ((pixels.astype(np.uint32) * 255 + most // 2) // most).astype(np.uint8)
    else:
        grey = (pixels >> (bits - 8)).astype(np.uint8)
    if white_is_zero:  # which Pillow takes into account for 8 bits only
        grey = 255 - grey
    if isinstance(transparent := file.info.get("transparency"), int):
        grey[pixels == transparent] = 255
    return grey


def _declared_maximum(file: Image.Image) -> int | None:
    """MaxSampleValue of a TIFF whose numbers have fewer bits than they are stored in, such as 4095 in 16 bits; else
    None. TIFF 6.0 calls it a statistic that must not change how an image looks, and some programs store the brightest
    pixel there, so only 2^n - 1 is taken for what white is."""
    if not isinstance(file, TiffImagePlugin.TiffImageFile) or file.tag_v2.get(_PHOTOMETRIC) not in (0, 1, 2):
        return None
    declared, bits = file.tag_v2.get(_MAXIMUM), file.tag_v2.get(_BITS, (1,))
    most = max(declared) if isinstance(declared, tuple) else declared
    if not isinstance(most, int) or max(bits) < 8 or not 0 < most < (1 << max(bits)) - 1 or most & (most + 1):
        return None
    return most


def _stretched(image: Image.Image, most: int) -> Image.Image:
    """``image``, of 8 bits, with ``most`` as white; as it is if it holds more than that."""
    if image.mode not in ("L", "RGB") or np.asarray(image).max() > most:
        return image
    return image.point([min(255, round(value * 255 / most)) for value in range(256)] * len(image.getbands()))


def _has_several_frames(file: Image.Image) -> bool:
    """Asked after the first frame has been decoded: what follows may be damaged and does no harm."""
    with suppress(Exception):
        return file.format != "MPO" and bool(getattr(file, "is_animated", False))  # MPO: previews and depth maps
    return False
