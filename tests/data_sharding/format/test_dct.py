"""Views, tokens, the dct codec and the demo's photographs, each against the plainest version of itself."""

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_sharding.errors import UserError
from data_sharding.format.codecs import get_codec
from data_sharding.format.dct import DctCodec
from data_sharding.format.patches import patchify, unpatchify
from data_sharding.write.views import (
    UnreadableImage,
    crop_view,
    encode_views,
    load_rgb,
    resize_tokens,
    resize_view,
    square_side,
    views_of,
)
from launchers import demo_images


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encode(pixels: np.ndarray) -> np.ndarray:
    return DctCodec().encode(pixels[None])[0]


def views(image: Image.Image, max_tokens: int) -> dict[str, np.ndarray]:
    return encode_views({0: views_of(image, max_tokens)}, DctCodec())[0]


# views


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
            np.testing.assert_array_equal(array[flip], patchify(encode(pixels)).astype(np.float16))


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


def test_exif_rotation_is_applied():
    image = noise(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise
    turned = load_rgb(file_of(image, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


def test_every_mode_becomes_rgb():
    gray = Image.linear_gradient("L")
    for image, kind in (
        (gray, "PNG"),
        (gray.convert("1"), "PNG"),
        (gray.convert("LA"), "PNG"),
        (noise(16, 16).convert("P"), "PNG"),
        (noise(16, 16).convert("RGBA"), "PNG"),
        (noise(16, 16).convert("CMYK"), "JPEG"),
        (noise(16, 16).convert("YCbCr"), "JPEG"),
    ):
        assert load_rgb(file_of(image, kind)).mode == "RGB", image.mode
    cyan = load_rgb(file_of(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG")).getpixel((3, 3))
    assert cyan[0] < 10 and min(cyan[1:]) > 245  # not inverted
    deep = Image.fromarray(np.full((16, 16), 0x8000, np.uint16))
    assert load_rgb(file_of(deep, "PNG")).getpixel((3, 3)) == (128, 128, 128)  # scaled, not clipped to white
    clear = load_rgb(file_of(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "PNG"))
    assert clear.getpixel((3, 3)) == (255, 255, 255)  # not the black that transparency hides


def test_damaged_bytes_have_a_reason_that_is_always_the_same():
    """The reason is stored, so it must not hold the address of an object."""
    whole = file_of(noise(64, 64), "JPEG")
    for data in (b"", b"text", whole[:200], whole[: len(whole) // 2], file_of(noise(64, 64), "PNG")[:3000]):
        reasons = set()
        for _ in range(2):
            with pytest.raises(UnreadableImage) as error:
                load_rgb(bytes(bytearray(data)))
            reasons.add(str(error.value))
        assert len(reasons) == 1 and "0x" not in reasons.pop()


# tokens


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


# the dct codec


@pytest.fixture(scope="module")
def pictures():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    return {p.name: resize_view(demo_images._open(p), 100) for p in demo_images.PHOTOGRAPHS}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def test_coefficients_are_those_of_the_dct():
    """Against JPEG's YCbCr and scipy's orthonormal DCT of each cell."""
    fft = pytest.importorskip("scipy.fft")
    pixels = np.asarray(noise(32, 48))
    latent = encode(pixels)
    ycc = pixels @ np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]).T
    for i, j in np.ndindex(4, 6):
        cell = ycc[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
        y = fft.dctn(cell[..., 0] - 127.5, norm="ortho")
        # orthonormal to levels: the mean's wave has norm 8, a slope's sqrt(32)
        assert latent[:3, i, j] == pytest.approx(
            np.array([y[0, 0] / 8, y[0, 1] / 32**0.5, y[1, 0] / 32**0.5]) / (58, 18, 18), abs=1e-3
        )
        pair = ycc[8 * i : 8 * i + 8, 8 * (j // 2 * 2) : 8 * (j // 2 * 2) + 16]
        assert latent[3, i, j] == pytest.approx(pair[..., 1 + j % 2].mean() / (19, 24)[j % 2], abs=1e-3)


def test_latents_do_not_depend_on_the_order_of_summation():
    """The sums equal those in 64-bit integers, so no order of adding rounds; a token alone gives the same bits."""
    pixels = np.asarray(noise(64, 96))
    latent = encode(pixels)
    assert latent.dtype == np.float32 and latent.shape == (4, 8, 12)
    for i, j in np.ndindex(4, 6):
        token = encode(pixels[16 * i : 16 * i + 16, 16 * j : 16 * j + 16])
        np.testing.assert_array_equal(token, latent[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2])
    luma = pixels.astype(np.int64) @ np.array([19595, 38470, 7471])  # 2**16 * (0.299, 0.587, 0.114)
    slope = np.array([4017, 3406, 2276, 799, -799, -2276, -3406, -4017])  # 2**12 * cos((2k+1) pi/16)
    across = (luma.reshape(8, 8, 12, 8).sum(1) * slope).sum(-1)
    np.testing.assert_array_equal(latent[1], (across / (32 * 2**16 * 2**12 * 18.0)).astype(np.float32))


def test_decoding_a_mirrored_image_mirrors_it(pictures):
    pixels = np.asarray(pictures["pagoda"])
    codec = DctCodec()
    straight, mirrored = codec.decode(encode(pixels)), codec.decode(encode(pixels[:, ::-1]))
    assert np.abs(straight.astype(int) - mirrored[:, ::-1]).max() <= 1


def test_photographs_come_back(pictures):
    """The figures of the codec's docstring, and no seams: steps across cell edges as inside cells."""
    expected = {"astronaut": 19.8, "cat": 27.1, "coffee": 23.0, "rocket": 27.4, "flower": 24.2, "pagoda": 22.4}
    codec = DctCodec()
    for name, picture in pictures.items():
        pixels = np.asarray(picture)
        decoded = codec.decode(encode(pixels))
        assert decoded.shape == pixels.shape and decoded.dtype == np.uint8
        assert psnr(decoded, pixels) == pytest.approx(expected[name], abs=0.3), name
        steps = np.abs(np.diff(decoded.astype(float).mean(-1), axis=1)).mean(0)
        edges = np.arange(len(steps)) % 8 == 7
        assert steps[edges].mean() < 1.5 * steps[~edges].mean(), name


def test_flat_colours_come_back_exactly():
    codec = DctCodec()
    for color in ((0, 0, 0), (255, 255, 255), (200, 30, 60), (20, 160, 90)):
        pixels = np.broadcast_to(np.array(color, np.uint8), (32, 48, 3))
        assert np.abs(codec.decode(encode(pixels)).astype(int) - pixels).max() <= 1, color


def test_latents_of_the_demo_have_about_unit_variance(pictures):
    tokens = np.concatenate([patchify(encode(np.asarray(p))).reshape(-1, 16) for p in pictures.values()])
    variance = tokens.reshape(-1, 4, 2, 2).var(axis=0)
    assert variance.min() > 0.6 and variance.max() < 1.7, variance


def test_codecs_by_name():
    assert get_codec("dct").digest == DctCodec().digest and len(DctCodec().digest) == 64
    with pytest.raises(UserError, match="there is no codec 'jpeg': use 'dct' or 'sd-vae'"):
        get_codec("jpeg")


# the demo's photographs


def test_the_demos_crops_are_the_same_every_time_and_of_natural_lengths(tmp_path, pictures):
    assert demo_images.main([str(tmp_path / "a"), "--crops", "240"]) == 0
    demo_images.write_photographs(tmp_path / "b", 240)
    files = sorted(f.relative_to(tmp_path / "a") for f in (tmp_path / "a").rglob("*.jpg"))
    assert len(files) == 240 and len({f.parent for f in files}) == len(demo_images.PHOTOGRAPHS)
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    sizes = [Image.open(tmp_path / "a" / file).size for file in files]
    resize = np.array([math.prod(resize_tokens(h, w, 100)) for w, h in sizes])
    crop = np.array([min(size) > 160 for size in sizes])
    assert 64 <= np.where(crop, (resize + 100) / 2, resize).mean() <= 100
    assert 0.25 < crop.mean() < 0.75 and len(set(sizes)) > 200 and len(set(resize.tolist())) > 15
    aspects = np.array([w / h for w, h in sizes])
    assert (aspects < 1).mean() > 0.1 and (aspects > 1.4).mean() > 0.1
    draws = np.array([0.5, 0.5, 0.1, 0.9, 0.0])
    whole = demo_images._open(demo_images.PHOTOGRAPHS[0])
    small, large = (demo_images.crop(whole, draws, scale) for scale in (1, 2))
    assert large.size == pytest.approx(2 * np.array(small.size), abs=1)
    assert np.abs(np.asarray(large.resize(small.size, Image.Resampling.BOX), int) - np.asarray(small)).mean() < 8
    credits = (tmp_path / "a/CREDITS.txt").read_text()
    assert all(f"{p.name}: {p.credit}" in credits for p in demo_images.PHOTOGRAPHS)


def test_missing_packages_are_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_images, "PHOTOGRAPHS", (demo_images.Photograph("x", "no_such_package", "x.png", ""),))
    assert demo_images.main([str(tmp_path)]) == 2
    assert "pip install 'fitv2-scale[demo]'" in capsys.readouterr().err
