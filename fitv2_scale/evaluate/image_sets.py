"""Sets of images to be measured: a folder, tars, a dataset of this project, or an .npz.

Images of another size than the one asked for are resized until they just cover it, and their centre is cropped
(``cover_crop``: for a square, ADM's own preparation). So the reference for 160x320 holds the middle bands of
photographs, never stretched ones. How the references of non-square sizes were made is not published; metrics for them
can only be compared with metrics against the same reference.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_sharding.errors import UserError
from data_sharding.format.codecs import codec_of
from data_sharding.format.manifest import FILE, Manifest, read_header
from data_sharding.storage.byte_ranges import ByteRange
from data_sharding.storage.file_digest import file_digest
from data_sharding.storage.files import exists
from data_sharding.storage.tar_members import is_tar_name
from data_sharding.stream.frames import read_frame
from data_sharding.write.entries import no_images
from data_sharding.write.findings import Findings
from data_sharding.write.image_file import IMAGE_SUFFIXES, UnreadableImage, load_rgb
from data_sharding.write.image_sources import open_source
from data_sharding.write.source_files import list_folder, list_top
from data_sharding.write.views import cover_crop
from data_sharding.write.write_report import counts_of
from fitv2_scale.evaluate.features import is_npz, read_npz
from fitv2_scale.evaluate.sampling.image_grid import decode

ARRAY = "arr_0"  # the images in ADM's .npz
_NAMED = 10  # images in a sentence


@dataclass
class ImageSet:
    """``count`` images of one ``size`` (height, width). ``read`` reads them one by one: uint8 (H, W, 3).

    An image that cannot be read is left out, as `fitv2 shard write` does: ``left_out`` names it with the reason, and
    from then on ``count`` is one less. ``counts``: what else the source holds, as ``counts_of`` gives it.
    """

    source: str
    count: int
    size: tuple[int, int]
    read: Callable[[], Iterator[np.ndarray]]
    left_out: dict[str, str] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def besides(self) -> dict[str, Any]:
        """What of the source was not measured, for a result: ``counts``, and ``left_out`` if there is any."""
        return self.counts | ({"left_out": self.left_out} if self.left_out else {})

    def left_out_sentence(self) -> str:
        """What to tell the user, if something was left out."""
        named = [f"{name} ({reason})" for name, reason in list(self.left_out.items())[:_NAMED]]
        rest = [f"{len(self.left_out) - _NAMED} more"] if len(self.left_out) > _NAMED else []
        return (
            f"{len(self.left_out)} of the images in {self.source} cannot be read and were left out: "
            f"{'; '.join([*named, *rest])}: remove them or get them again"
        )


def open_image_set(url: str, size: tuple[int, int] | None, most: int, vae: str = "") -> ImageSet:
    """At most ``most`` of the images at ``url``, evenly spaced over all: any folder of images, tars as for `fitv2 shard
    write`, a dataset (decoded, so that the metrics include the loss of its codec), or an .npz.

    ``size`` is in pixels; an .npz has its own. ``vae`` decodes a dataset of sd-vae latents.

    Raises:
        UserError: there are none, or ``size`` is missing.
    """
    if is_npz(url):
        return image_set_of_array(url, read_npz(url).get(ARRAY), most)
    if size is None:
        raise UserError(f"{url} may hold images of many sizes: give the size to measure at as --size HEIGHTxWIDTH")
    if exists(f"{url.rstrip('/')}/{FILE}"):
        return _of_dataset(url, size, most, vae)
    found, findings = _list_files(url)
    left_out = dict(findings.left_out)
    chosen = [found[i] for i in evenly_spaced_rows(len(found), most)]
    images = ImageSet(url, len(chosen), size, lambda: _read_files(images, chosen), left_out, counts_of(findings))
    return images


def image_set_digest(url: str, most: int, vae: str = "") -> str:
    """Hex xxh3_128 of the content of what ``open_image_set`` gives, wherever it lies: of a dataset, its digest and that
    of the codec that decodes it; of a folder or tars, the files. Raises as ``open_image_set``."""
    if is_npz(url):
        return file_digest(url)
    digest = xxhash.xxh3_128()
    if exists(f"{url.rstrip('/')}/{FILE}"):
        header, dataset = read_header(url.rstrip("/"))
        digest.update(f"{dataset} {codec_of(header.codec, vae).digest}".encode())
        return digest.hexdigest()
    found, _ = _list_files(url)
    for i in evenly_spaced_rows(len(found), most):
        name, data = found[i][0], found[i][1].read()
        digest.update(f"{name.removeprefix(url).lstrip('/')} {len(data)}\n".encode(errors="surrogateescape"))
        digest.update(data)
    return digest.hexdigest()


def _list_files(url: str) -> tuple[list[tuple[str, ByteRange]], Findings]:
    """The files of images at ``url`` by name, and what is left out."""
    may_be_tars = is_tar_name(url) or "{" in url
    if (may_be_tars and not Path(url).is_dir()) or _is_folder_of_tars(url):
        source = open_source(url)
        found, findings = [(entry.key, entry.data) for entry in source.entries], source.findings
    else:
        findings = Findings()
        files = list_folder(url, IMAGE_SUFFIXES, findings).files
        found = sorted(files.items(), key=lambda item: item[0].split("/"))  # folder by folder
    if not found:
        raise no_images(f"{url} holds", findings)
    return found, findings


def _is_folder_of_tars(url: str) -> bool:
    top = list_top(url)
    return not top.folders and any(is_tar_name(name) for name in top.files)


def _read_files(images: ImageSet, chosen: list[tuple[str, ByteRange]]) -> Iterator[np.ndarray]:
    for name, data in chosen:
        if name in images.left_out:
            continue
        try:
            yield np.asarray(cover_crop(load_rgb(data.read()), *images.size))
        except UnreadableImage as error:
            images.left_out[name] = str(error)
            images.count -= 1


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
