"""Sets of images to be measured: a folder, tars, a dataset of this project, or an .npz.

Images of another size than the one asked for are resized until they just cover it, and their centre is cropped
(``cover_crop``: for a square, ADM's own preparation). So the reference for 160x320 holds the middle bands of
photographs, never stretched ones. How the references of non-square sizes were made is not published; metrics for them
can only be compared with metrics against the same reference.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_sharding.errors import UserError
from data_sharding.format.codecs import codec_of
from data_sharding.format.manifest import FILE, Manifest
from data_sharding.storage.files import exists
from data_sharding.stream.frames import read_frame
from data_sharding.write.image_sources import IMAGE_SUFFIXES, open_source
from data_sharding.write.views import UnreadableImage, cover_crop, load_rgb
from fitv2_scale.evaluate.features import read_npz
from fitv2_scale.evaluate.sampling.image_grid import decode

ARRAY = "arr_0"  # the images in ADM's .npz


@dataclass(frozen=True)
class ImageSet:
    """``count`` images of one ``size`` (height, width). ``read`` reads them one by one: uint8 (H, W, 3)."""

    source: str
    count: int
    size: tuple[int, int]
    read: Callable[[], Iterator[np.ndarray]]


def open_image_set(url: str, size: tuple[int, int] | None, most: int, vae: str = "") -> ImageSet:
    """At most ``most`` of the images at ``url``, evenly spaced over all: class folders or any local folder of images,
    tars as for `fitv2 shard write`, a dataset (decoded, so that the metrics include the loss of its codec), or an .npz.

    ``size`` is in pixels; an .npz has its own. ``vae`` decodes a dataset of sd-vae latents.

    Raises:
        UserError: there are none, or ``size`` is missing.
    """
    if url.endswith(".npz"):
        return image_set_of_array(url, read_npz(url).get(ARRAY), most)
    if size is None:
        raise UserError(f"{url} may hold images of many sizes: give the size to measure at as --size HEIGHTxWIDTH")
    if exists(f"{url.rstrip('/')}/{FILE}"):
        return _of_dataset(url, size, most, vae)
    if Path(url).is_dir() and not any(Path(url).glob("*.tar")):
        files = sorted(path for path in Path(url).rglob("*") if path.name.lower().endswith(IMAGE_SUFFIXES))
        found: list[tuple[str, Callable[[], bytes]]] = [(str(path), path.read_bytes) for path in files]
    else:
        found = [(entry.key, entry.data.read) for entry in open_source(url).entries]
    if not found:
        raise UserError(f"{url} holds no images, that is files named {', '.join(IMAGE_SUFFIXES)}")
    chosen = [found[i] for i in evenly_spaced_rows(len(found), most)]
    return ImageSet(url, len(chosen), size, lambda: (_load_image(name, read(), size) for name, read in chosen))


def image_set_of_array(where: str, array: np.ndarray | None, most: int) -> ImageSet:
    """The images of ``arr_0``, uint8 (N, H, W, 3). Raises UserError for any other array."""
    if array is None or array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        found = "missing" if array is None else f"{array.dtype}{list(array.shape)}"
        raise UserError(f"{where}: {ARRAY} is {found}, not uint8 [images, height, width, 3]")
    rows = evenly_spaced_rows(len(array), most)
    return ImageSet(where, len(rows), array.shape[1:3], lambda: (array[i] for i in rows))


def evenly_spaced_rows(count: int, most: int) -> np.ndarray:
    """At most ``most`` of the rows 0 to ``count`` - 1, evenly spaced, ascending."""
    taken = min(count, most)
    return np.arange(taken, dtype=np.int64) * count // max(taken, 1)


def _load_image(name: str, data: bytes, size: tuple[int, int]) -> np.ndarray:
    try:
        return np.asarray(cover_crop(load_rgb(data), *size))
    except UnreadableImage as error:
        raise UserError(f"{name} cannot be read ({error}): remove it or get it again") from error


def _of_dataset(url: str, size: tuple[int, int], most: int, vae: str) -> ImageSet:
    manifest = Manifest.load(url)
    codec = codec_of(manifest.header.codec, vae)
    rows = evenly_spaced_rows(len(manifest.sample_id), most)

    def read() -> Iterator[np.ndarray]:
        """The resize view, which shows the whole photograph, not flipped."""
        frame_of_row = np.searchsorted(manifest.frame_first, rows, side="right") - 1
        for frame in np.unique(frame_of_row).tolist():
            samples, first = read_frame(manifest, frame), int(manifest.frame_first[frame])
            for row in rows[frame_of_row == frame].tolist():
                tokens = samples[row - first].views["resize"][0].astype(np.float32)
                yield np.asarray(cover_crop(decode(tokens, codec), *size))

    return ImageSet(url, len(rows), size, read)
