"""Views of an image: sizes, crops and flips, each against the plainest version of itself."""

import math

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_sharding.errors import UserError
from data_sharding.format.dct import DctCodec
from data_sharding.format.patches import patchify
from data_sharding.write.views import (
    crop_view,
    encode_views,
    resize_tokens,
    resize_view,
    square_side,
    views_of,
)
from tests.support.pictures import noise


def views(image: Image.Image, max_tokens: int) -> dict[str, np.ndarray]:
    return encode_views({0: views_of(image, max_tokens)}, DctCodec())[0]


@pytest.mark.parametrize(
    ("height", "width", "max_tokens", "expected"),
    [
        (375, 500, 256, (13, 18)),  # the sizes that the reference's rule gives
        (333, 500, 256, (13, 19)),
        (500, 500, 256, (16, 16)),
        (375, 500, 1024, (23, 31)),  # 500x375 < 512x512: never enlarged, only floored
        (480, 640, 1024, (27, 36)),
        (100, 100, 256, (6, 6)),
        (10, 100, 256, (1, 6)),  # sides under 16 become 16
        (5, 5, 256, (1, 1)),
        (10, 3000, 100, (1, 100)),  # so thin that 16 pixels of height would pass the limit
        (3000, 10, 100, (100, 1)),
        (1, 20000, 100, (1, 100)),
    ],
)
def test_resize_rule(height, width, max_tokens, expected):
    assert resize_tokens(height, width, max_tokens) == expected


def test_resize_rule_is_the_floating_one_in_integers():
    rng = np.random.default_rng(0)
    for h, w in rng.integers(16, 2000, (5000, 2)).tolist():
        for max_tokens in (100, 256, 1024):
            side = 16 * math.sqrt(max_tokens)
            wide, high = w, h
            if w * h >= side * side:
                wide = math.sqrt(w / h) * side
                high = wide * h / w
            ours = resize_tokens(h, w, max_tokens)
            assert ours[0] * ours[1] <= max_tokens and ours[0] * 16 <= max(h, 16) and ours[1] * 16 <= max(w, 16)
            if min(wide, high) >= 16 and abs(wide / 16 % 1 - 0.5) < 0.499 and abs(high / 16 % 1 - 0.5) < 0.499:
                assert ours == (int(high // 16), int(wide // 16)), (h, w)


def test_views_have_the_sizes_of_the_rule_and_keep_what_fits():
    image = noise(50, 70)
    assert resize_view(image, 256).size == (64, 48)
    assert resize_view(noise(48, 64), 256).size == (64, 48)
    np.testing.assert_array_equal(resize_view(noise(48, 64), 256), noise(48, 64))  # no resampling where none is needed
    assert views(noise(200, 300), 100)["crop"].shape == (2, 10, 10, 16)
    assert set(views(noise(160, 300), 100)) == {"resize"}


def test_views_hold_the_image_and_its_mirror_image():
    image = noise(200, 300)
    for view, picture in (("resize", resize_view(image, 100)), ("crop", crop_view(image, 100))):
        array = views(image, 100)[view]
        assert array.dtype == np.float16
        for flip, pixels in enumerate((np.asarray(picture), np.asarray(ImageOps.mirror(picture)))):
            np.testing.assert_array_equal(array[flip], patchify(DctCodec().encode(pixels[None])[0]).astype(np.float16))


def adm_center_crop(image: Image.Image, side: int) -> np.ndarray:
    """guided-diffusion's center_crop_arr, as published."""
    while min(*image.size) >= 2 * side:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = side / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    y, x = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    return array[y : y + side, x : x + side]


@pytest.mark.parametrize(("height", "width"), [(161, 161), (161, 402), (333, 500), (900, 321), (1300, 700)])
def test_crop_is_adm_center_crop(height, width):
    image = noise(height, width)
    np.testing.assert_array_equal(np.asarray(crop_view(image, 100)), adm_center_crop(image, 160))


def test_there_is_a_crop_only_of_images_larger_on_both_sides():
    assert crop_view(noise(160, 400), 100) is None and crop_view(noise(400, 160), 100) is None
    assert crop_view(noise(161, 161), 100).size == (160, 160)


def test_max_tokens_must_be_square():
    assert square_side(100) == 160
    for bad in (0, -4, 99, 255):
        with pytest.raises(UserError, match=f"square number such as 100, 256 or 1024, not {bad}"):
            square_side(bad)


def test_pictures_of_one_size_are_encoded_together():
    calls = []

    class Spy:
        batch_pixels = 8 * 64 * 64

        def encode(self, pixels, draws):
            calls.append((pixels.shape[:3], draws))
            return np.zeros((len(pixels), 4, pixels.shape[1] // 8, pixels.shape[2] // 8), np.float32)

    pictures = {i: {"resize": np.asarray(noise(48, 64)), "crop": np.asarray(noise(64, 64))} for i in range(6)}
    encoded = encode_views(pictures, Spy())
    assert [shape for shape, _ in calls] == [(10, 48, 64), (2, 48, 64), (8, 64, 64), (4, 64, 64)]
    assert calls[0][1][:3] == [(0, 0), (0, 1), (1, 0)] and calls[3][1] == [(4, 2), (4, 3), (5, 2), (5, 3)]
    assert encoded[5]["crop"].shape == (2, 4, 4, 16)


def test_flips_and_views_land_where_they_belong():
    """A codec that only writes down what it was given."""

    class Mark:
        batch_pixels = 1 << 20

        def encode(self, pixels, draws):
            marks = [draw.id * 10 + draw.picture for draw in draws]
            assert [p[0, 0, 0] < p[0, -1, 0] for p in pixels] == [draw.picture % 2 == 0 for draw in draws]
            return np.array(marks, np.float32)[:, None, None, None] * np.ones((1, 4, 8, 8), np.float32)

    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3))
    encoded = encode_views({3: {"resize": ramp, "crop": ramp}, 5: {"resize": ramp}}, Mark())
    assert encoded[3]["resize"][:, 0, 0, 0].tolist() == [30, 31] and encoded[3]["crop"][:, 0, 0, 0].tolist() == [32, 33]
    assert encoded[5]["resize"][:, 0, 0, 0].tolist() == [50, 51]
