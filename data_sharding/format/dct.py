"""The codec ``dct``: a block DCT without weights. It needs no download, is fast on a CPU, and decodes to pictures."""

from functools import cache
from hashlib import sha256

import numpy as np

from data_sharding.format.codec import CodecRecord, Draw

_CELL = 8
# Levels (of 255) that make one unit of latent: the standard deviations of the five coefficients over the resize views
# (max_tokens 100) of the 2,000 crops that `launchers/demo_images.py` makes, rounded.
_UNIT = {"y": 58.0, "y_across": 18.0, "y_down": 18.0, "cb": 19.0, "cr": 24.0}
# JPEG's YCbCr and the slope cos((2k+1)pi/16) of the 8-point DCT, as integers: sums of their products with pixels stay
# below 2**53, so float64 adds them exactly and the latents do not depend on the order of summation (BLAS, threads).
_COLOR_ONE = 1 << 16
_COLOR = np.rint(
    _COLOR_ONE * np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
)
_SLOPE_ONE = 1 << 12
_SLOPE = np.rint(_SLOPE_ONE * np.cos((2 * np.arange(_CELL) + 1) * np.pi / (2 * _CELL)))
_REACH = 24.0  # pixels; correlation of the image model that decode assumes


class DctCodec:
    """Block DCT without weights: of each 8x8 cell the mean and the two slopes of luma, and chroma at half that width.

    Channels 0, 1, 2 are the luma coefficients Y00, Y01 (across) and Y10 (down). Channel 3 holds, for each two
    neighbouring cells, the mean Cb of both in the left and the mean Cr of both in the right one. As a token is 2x2
    cells, channel 3 has the same meaning in every token. Each is divided by its typical standard deviation.

    ``decode`` does not paint cells. It gives each pixel its best linear estimate from the coefficients near it, for
    images whose pixels correlate as exp(-distance / 24 px), so brightness and colour are continuous across cells.

    Measured on the six photographs of the demo at the area of 160x160 pixels (PSNR over RGB, dB; astronaut, cat,
    coffee, rocket, flower, china): this codec 19.9, 27.1, 23.1, 27.4, 24.3, 22.4, small sharp pictures with true
    colours; Y00, Cb, Cr and one diagonal slope 17.5, 24.6, 21.2, 25.9, 22.8, 21.1, combed edges; Y00, Y01, Y10 and one
    axis of chroma 19.8, 26.6, 23.0, 26.2, 22.9, 22.0, as sharp, but greens, blues and reds swap. Painting cells costs
    0.4 to 1.3 dB and makes each of them visible.
    """

    name = "dct"
    scale = 1.0
    downsample = _CELL
    channels = 4
    batch_pixels = 1  # one picture at a time stays in the cache

    @property
    def record(self) -> CodecRecord:
        return {"name": self.name, "digest": self.digest, "scale": self.scale}

    @property
    def digest(self) -> str:
        """Hex sha256 of the arithmetic: the integers of colour and slope, and the units."""
        units = np.array(list(_UNIT.values()))
        return sha256(b"dct 1" + b"".join(a.astype("<f8").tobytes() for a in (_COLOR, _SLOPE, units))).hexdigest()

    def encode(self, pixels: np.ndarray, draws: list[Draw] | None = None) -> np.ndarray:
        """As in ``Codec``; nothing is random here."""
        count, height, width, _ = pixels.shape
        assert pixels.dtype == np.uint8 and height % 16 == 0 and width % 16 == 0, (pixels.dtype, pixels.shape)
        color = pixels.astype(np.float64) @ _COLOR.T
        cells_of = (count, height // _CELL, _CELL, width // _CELL, _CELL, 3)
        y, cb, cr = color.reshape(cells_of).transpose(5, 0, 1, 3, 2, 4)  # each (B, h, w, 8, 8)
        ones = np.ones(_CELL)
        cells = _CELL * _CELL * _COLOR_ONE
        latent = np.empty((count, 4, *y.shape[1:3]))
        latent[:, 0] = ((ones @ y @ ones) / cells - 127.5) / _UNIT["y"]
        # The slope's square sums to half a cell: what is left is its amplitude in levels.
        latent[:, 1] = (ones @ y @ _SLOPE) / (cells / 2 * _SLOPE_ONE * _UNIT["y_across"])
        latent[:, 2] = (_SLOPE @ y @ ones) / (cells / 2 * _SLOPE_ONE * _UNIT["y_down"])
        for side, name, chroma in ((0, "cb", cb), (1, "cr", cr)):
            total = ones @ chroma @ ones
            latent[:, 3, :, side::2] = (total[..., 0::2] + total[..., 1::2]) / (2 * cells * _UNIT[name])
        return latent.astype(np.float32)

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """As in ``Codec``."""
        latent = np.asarray(latent, np.float64)
        assert latent.ndim == 3 and latent.shape[0] == 4, latent.shape
        luma = latent[:3] * np.array([_UNIT["y"], _UNIT["y_across"], _UNIT["y_down"]])[:, None, None]
        cb, cr = latent[3, :, 0::2] * _UNIT["cb"], latent[3, :, 1::2] * _UNIT["cr"]
        ycc = np.stack([
            _estimate(luma, _CELL, ((0, 0), (0, 1), (1, 0)), reach=2) + 127.5,
            _estimate(cb[None], 2 * _CELL, ((0, 0),), reach=1),
            _estimate(cr[None], 2 * _CELL, ((0, 0),), reach=1),
        ], axis=-1)  # fmt: skip
        rgb = ycc @ np.linalg.inv(_COLOR / _COLOR_ONE).T
        return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def _estimate(coefficients: np.ndarray, cell_width: int, orders: tuple, reach: int) -> np.ndarray:
    """Coefficients (k, h, w) of ``orders`` (down, across) to pixels (h*8, w*cell_width), by cells in ``reach``."""
    _, h, w = coefficients.shape
    padded = np.pad(coefficients, ((0, 0), (reach, reach), (reach, reach)), mode="symmetric")
    for plane, (down, across) in zip(padded, orders, strict=True):
        if down:  # in its mirror image a slope is upside down
            plane[:reach] *= -1
            plane[-reach:] *= -1
        if across:
            plane[:, :reach] *= -1
            plane[:, -reach:] *= -1
    span = range(2 * reach + 1)
    near = np.stack([padded[:, i : i + h, j : j + w] for i in span for j in span])  # (cells, k, h, w)
    near = near.reshape(-1, h, w).transpose(1, 2, 0)
    pixels = (near @ _weights(cell_width, orders, reach).T).reshape(h, w, _CELL, cell_width)
    return pixels.transpose(0, 2, 1, 3).reshape(h * _CELL, w * cell_width)


@cache
def _weights(cell_width: int, orders: tuple, reach: int) -> np.ndarray:
    """The linear estimate (8*cell_width, cells*k) of a cell's pixels from the coefficients of the cells around it.

    With pixel covariance K and coefficients A x, it is K A' (A K A' + e)^-1 at the pixels of the middle cell. The large
    constant in K models an unknown mean, so that flat colours stay flat; the small e keeps the estimate
    from amplifying noise in the latents.
    """
    side = 2 * reach + 1
    rows, columns = (a.ravel() for a in np.mgrid[: side * _CELL, : side * cell_width])
    covariance = 100 + np.exp(-np.hypot(rows[:, None] - rows, columns[:, None] - columns) / _REACH)
    analysis = []
    for i in range(side):
        for j in range(side):
            inside = (rows // _CELL == i) & (columns // cell_width == j)
            for down, across in orders:
                wave = np.cos((2 * (rows % _CELL) + 1) * down * np.pi / (2 * _CELL))
                wave = wave * np.cos((2 * (columns % cell_width) + 1) * across * np.pi / (2 * cell_width))
                analysis.append(np.where(inside, wave / (wave[inside] ** 2).sum(), 0))
    A = np.array(analysis)
    KA = covariance @ A.T
    AKA = A @ KA + 5e-4 * np.eye(len(A))
    middle = (rows // _CELL == reach) & (columns // cell_width == reach)
    return np.linalg.solve(AKA, KA[middle].T).T
