"""FiT's two views of an image, as pixels and as patches: resized to at most ``max_tokens``; ADM's centre crop.

A token is 16x16 pixels; S = 16 * sqrt(max_tokens) is the side of a square image of max_tokens.
"""

from math import isqrt

import numpy as np
from PIL import Image

from data_sharding.errors import UserError
from data_sharding.format.codec import Codec, Draw
from data_sharding.format.patches import TOKEN_PIXELS, patchify
from data_sharding.format.shard import VIEWS


def square_side(max_tokens: int) -> int:
    """S in pixels. Raises UserError if max_tokens is not a square number: the crop view is a square of max_tokens."""
    root = isqrt(max(max_tokens, 0))
    if root < 1 or root * root != max_tokens:
        raise UserError(f"max_tokens must be a square number such as 100, 256 or 1024, not {max_tokens}")
    return root * TOKEN_PIXELS


def resize_view(image: Image.Image, max_tokens: int) -> Image.Image:
    """The whole image with sides floored to multiples of 16 and at most ``max_tokens`` tokens; never larger than it
    was, except sides under 16 pixels (FiT, in1k_dataset.py:34-53; the public latents agree with it)."""
    h, w = resize_tokens(image.height, image.width, max_tokens)
    return _resize(image, w * TOKEN_PIXELS, h * TOKEN_PIXELS)


def resize_tokens(height: int, width: int, max_tokens: int) -> tuple[int, int]:
    """(h, w) in tokens of the resize view of an image of these sides in pixels.

    The rule in floats is w' = sqrt(w/h)*S, h' = w'*h/w if w*h >= S*S, then floor to multiples of 16. In integers
    floor(w'/16) = isqrt(w*max_tokens // h), exact for every size.
    """
    if width * height >= max_tokens * TOKEN_PIXELS**2:
        h, w = isqrt(height * max_tokens // width), isqrt(width * max_tokens // height)
    else:
        h, w = height // TOKEN_PIXELS, width // TOKEN_PIXELS
    h, w = max(h, 1), max(w, 1)
    # With a side raised to one token, an image more than max_tokens times as long as wide can exceed the limit.
    return min(h, max_tokens // w) or 1, min(w, max_tokens)


def crop_view(image: Image.Image, max_tokens: int) -> Image.Image | None:
    """The centre SxS pixels after shrinking the short side to S; None unless both sides exceed S."""
    side = square_side(max_tokens)
    return cover_crop(image, side, side) if min(image.size) > side else None


def cover_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The centre ``height`` x ``width`` pixels, after resizing the image so that it just covers them.

    For a square, ADM's ``center_crop_arr`` (guided-diffusion, image_datasets.py): halve by box while both sides are
    twice as long or more, then bicubic.
    """
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = _resize(image, max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def views_of(image: Image.Image, max_tokens: int) -> dict[str, np.ndarray]:
    """The views of an RGB image, each uint8 (H, W, 3): "resize", and "crop" where there is one."""
    pictures = {"resize": resize_view(image, max_tokens), "crop": crop_view(image, max_tokens)}
    return {view: np.asarray(picture) for view, picture in pictures.items() if picture is not None}


def encode_views(images: dict[int, dict[str, np.ndarray]], codec: Codec) -> dict[int, dict[str, np.ndarray]]:
    """The views of some images, by id, as ``views_of`` returns them; each becomes stored tokens, float16 (2, h,
    w, C): as it is and mirrored, encoded separately.

    Pictures of one size are encoded together, in the order of ``images``, so the calls of the codec depend on
    ``images`` only.
    """
    by_size: dict[tuple, list[tuple[int, str]]] = {}
    for image, views in images.items():
        for view, pixels in views.items():
            by_size.setdefault(pixels.shape, []).append((image, view))
    patches: dict[int, dict[str, np.ndarray]] = {image: {} for image in images}
    for (height, width, _), named in by_size.items():
        count = max(codec.batch_pixels // (2 * height * width), 1)
        for at in range(0, len(named), count):
            batch = named[at : at + count]
            pixels = np.stack([p for image, view in batch for p in (images[image][view], images[image][view][:, ::-1])])
            draws = [Draw(image, 2 * VIEWS.index(view) + flip) for image, view in batch for flip in (0, 1)]
            latents = patchify(codec.encode(pixels, draws)).astype(np.float16)
            for i, (image, view) in enumerate(batch):
                patches[image][view] = latents[2 * i : 2 * i + 2]
    return patches


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
