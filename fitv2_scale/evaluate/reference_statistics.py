"""Statistics of real images, with which generated images are compared; in ADM's .npz format.

    mu, sigma        mean and covariance of the pool features, float64 (D,), (D, D)
    mu_s, sigma_s    the same of the spatial features; absent if the network has none
    arr_0            uint8 (N, H, W, 3): images for precision and recall, at most 10,000, as in the published files

Files written here also hold ``pool``, the features of arr_0, and ``network``, the sha256 of their network. ADM's
evaluator reads both kinds of file, and so does ``open_reference``.
"""

import hashlib
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_sharding.errors import UserError
from data_sharding.storage.atomic_write import atomic_write
from fitv2_scale.evaluate.feature_network import FeatureNetwork
from fitv2_scale.evaluate.features import Features, is_npz, npz_bytes, read_npz
from fitv2_scale.evaluate.fid import Gaussian
from fitv2_scale.evaluate.image_sets import (
    ARRAY,
    ImageSet,
    evenly_spaced_rows,
    image_set_digest,
    image_set_of_array,
    open_image_set,
)

NEIGHBOUR_IMAGES = 10_000  # real images for precision and recall, as in the published references
_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
_BATCH = 50
_SIZED = re.compile(r"\d+x\d+\.npz", re.ASCII)


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of real images, and their ``features`` (N, D) for precision and recall. ``spatial`` and ``features``
    are None if they are not available. ``besides``: what their source holds besides them (see ``ImageSet``)."""

    source: str
    pool: Gaussian
    spatial: Gaussian | None
    features: np.ndarray | None
    size: tuple[int, int] | None  # of its images, in pixels
    besides: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict:
        """Its description in a result."""
        size = None if self.size is None else "{}x{}".format(*self.size)
        return {"source": self.source, "size": size} | self.besides


def reference_for(url: str, size: str | None) -> str:
    """The reference that ``url`` means for ``size``: of a folder of files such as 160x320.npz, the one for ``size``.
    Raises UserError if it has none, or if it needs a size to be chosen by."""
    folder = Path(url)
    if folder.is_dir() and (known := [path.name for path in folder.iterdir() if _SIZED.fullmatch(path.name)]):
        if size is None:
            raise UserError(f"{url} has a reference for each size: give the images' as --size HEIGHTxWIDTH")
        if f"{size}.npz" not in known:
            raise UserError(
                f"{url} has no {size}.npz: create it with `fitv2 evaluate PHOTOS --size {size} --save-statistics`"
            )
        return str(folder / f"{size}.npz")
    return url


def reference_identity(url: str, most: int, vae: str = "") -> dict[str, str | int]:
    """The reference at ``url``, as a result records it: by the digest of its content. ``most`` and ``vae`` as for
    ``open_reference``. Raises UserError if there is none."""
    if not is_npz(url):
        return {"source": url, "at_most": most, "digest": image_set_digest(url, most, vae)}
    try:
        with open(url, "rb") as file:
            return {"source": url, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise UserError(f"cannot read the reference {url}: {error.strerror}") from error


def check_reference(url: str, network: FeatureNetwork, size: int) -> None:
    """Raises UserError if ``url`` is an .npz that cannot be compared with the features of ``network``, which have
    ``size``: of another network, or no statistics."""
    if not is_npz(url):
        return
    arrays = read_npz(url, ("network", *_STATISTICS))
    _check_digest(url, arrays, network)
    mean = arrays.get("mu", np.zeros(size))
    if mean.shape != (size,):
        raise UserError(
            f"the network gives {size} features, but {url} has {mean.size}: use the network of the reference"
        )
    if "mu" in arrays:
        _gaussians(arrays, url)


def open_reference(
    url: str, size: tuple[int, int] | None, network: FeatureNetwork | None, most: int, vae: str = ""
) -> Reference:
    """The reference in an .npz, or of at most ``most`` of the images at ``url``, prepared as in ``open_image_set``.

    Raises:
        UserError: there is none, it is of another network, or a network is needed.
    """
    if not is_npz(url):
        images = open_image_set(url, size, most, vae)
        found = reference_from_features(features_of_images(images, network), url, images.size)
        return replace(found, besides=images.besides())
    arrays = read_npz(url)
    if network:
        _check_digest(url, arrays, network)
    if "mu" not in arrays:
        if "pool" in arrays:
            return reference_from_features(Features.from_arrays(arrays, url), url, None)
        images = image_set_of_array(url, arrays.get(ARRAY), most)
        return reference_from_features(features_of_images(images, network), url, images.size)
    real = Features.from_arrays(arrays, url).pool if "pool" in arrays else None
    if real is None and network and ARRAY in arrays:
        real = features_of_images(image_set_of_array(url, arrays[ARRAY], NEIGHBOUR_IMAGES), network).pool
    found = arrays[ARRAY].shape[1:3] if ARRAY in arrays else None
    return Reference(url, *_gaussians(arrays, url), real, found)


def reference_from_features(features: Features, source: str, size: tuple[int, int] | None) -> Reference:
    """The statistics of real images with these features. Raises UserError if they are too few, or not finite."""
    spatial = None if features.spatial is None else Gaussian.of(features.spatial, "spatial features")
    rows = evenly_spaced_rows(len(features), NEIGHBOUR_IMAGES)
    return Reference(source, Gaussian.of(features.pool, "pool features"), spatial, features.pool[rows], size)


def save_statistics(file: str, reference: Reference, images: ImageSet | None, network: FeatureNetwork | None) -> None:
    """Writes ``file``, an .npz as the module's docstring says, completely or not at all."""
    arrays = {"mu": reference.pool.mean, "sigma": reference.pool.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if images is not None:
        rows = set(evenly_spaced_rows(images.count, NEIGHBOUR_IMAGES).tolist())
        arrays[ARRAY] = np.stack([image for i, image in enumerate(images.read()) if i in rows])
    if reference.features is not None:
        arrays["pool"] = reference.features
    if network is not None:
        arrays["network"] = np.array(network.digest)
    try:
        with atomic_write(file, durable=False) as out:
            out.write(npz_bytes(arrays))
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def features_of_images(images: ImageSet, network: FeatureNetwork | None) -> Features:
    """The features of all images, with a progress bar; a line on stderr tells how many cannot be read."""
    if network is None:
        raise UserError(f"{images.source} holds images: give the network that computes their features as --network")
    parts, batch = [], []
    bar = tqdm(images.read(), images.source, images.count, unit="image", dynamic_ncols=True)
    for image in bar:
        batch.append(image)
        if len(batch) == _BATCH:
            parts.append(network(np.stack(batch)))
            batch = []
    if batch:
        parts.append(network(np.stack(batch)))
    if not parts:
        raise UserError(images.left_out_sentence() if images.left_out else f"{images.source} holds no images")
    if images.left_out:
        tqdm.write(images.left_out_sentence(), file=sys.stderr)
    return Features.joined(parts)


def _check_digest(url: str, arrays: dict[str, np.ndarray], network: FeatureNetwork) -> None:
    digest = str(arrays.get("network", network.digest))  # published files have none
    if digest != network.digest:
        raise UserError(
            f"{url} is of the network {digest:.16}, but yours is {network.digest:.16}: create the reference again"
        )


def _gaussians(arrays: dict[str, np.ndarray], where: str) -> tuple[Gaussian, Gaussian | None]:
    """Of the pool features, and of the spatial ones if there are any. Raises UserError if one is no Gaussian."""
    spatial = _gaussian(arrays, "_s", where) if {"mu_s", "sigma_s"} & arrays.keys() else None
    return _gaussian(arrays, "", where), spatial


def _gaussian(arrays: dict[str, np.ndarray], suffix: str, where: str) -> Gaussian:
    names = f"mu{suffix}", f"sigma{suffix}"
    if missing := [name for name in names if name not in arrays]:
        raise UserError(f"{where} lacks {missing[0]}: it is not a reference in ADM's format")
    if wrong := [name for name in names if arrays[name].dtype.kind not in "fiu"]:
        raise UserError(f"{where}: {wrong[0]} is {arrays[wrong[0]].dtype}, not real numbers: get the file again")
    found = Gaussian(*(np.asarray(arrays[name], np.float64) for name in names))
    found.check(where)
    return found
