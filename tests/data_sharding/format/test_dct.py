"""The dct codec against scipy's DCT, integer sums and the photographs of the demo."""

import math

import numpy as np
import pytest

from data_sharding.errors import UserError
from data_sharding.format.codecs import get_codec
from data_sharding.format.dct import DctCodec
from data_sharding.format.patches import patchify
from data_sharding.write.views import (
    resize_view,
)
from launchers import demo_images
from tests.support.pictures import noise


def encode(pixels: np.ndarray) -> np.ndarray:
    return DctCodec().encode(pixels[None])[0]


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
