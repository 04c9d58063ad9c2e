"""What made images are compared with: statistics of real ones, in ADM's .npz format.

    mu, sigma        mean and covariance of the pool features, float64 (D,), (D, D)
    mu_s, sigma_s    of the spatial features; absent if the network has none
    arr_0            uint8 (N, H, W, 3): pictures for precision and recall, at most 10,000, as in the published files

Files written here also hold ``pool``, the features of arr_0, and ``network``, the sha256 of the network they are of.
ADM's evaluator takes both kinds, and so does ``open_reference``.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_sharding.errors import UserError
from data_sharding.storage.atomic_write import atomic_write
from fitv2_scale.evaluate.feature_network import FeatureNetwork
from fitv2_scale.evaluate.features import Features, npz_bytes, read_npz
from fitv2_scale.evaluate.fid import Gaussian
from fitv2_scale.evaluate.image_sets import ARRAY, Pictures, open_pictures, pictures_of_array, spread_rows

NEIGHBOUR_IMAGES = 10_000  # real images for precision and recall, as in the published references
_BATCH = 50


@dataclass(frozen=True, eq=False)
class Reference:
    """``spatial`` and ``features`` (N, D), for precision and recall, are None where they cannot be had."""

    source: str
    pool: Gaussian
    spatial: Gaussian | None
    features: np.ndarray | None
    size: tuple[int, int] | None  # of its pictures, in pixels

    def record(self) -> dict:
        """What a result says of it."""
        size = None if self.size is None else "{}x{}".format(*self.size)
        return {"source": self.source, "size": size}


def reference_identity(url: str, size: str, most: int) -> dict[str, str | int]:
    """Which reference ``url`` means for ``size``, as a result keeps it. In a folder of files such as 160x320.npz, that
    one."""
    folder = Path(url)
    if folder.is_dir() and (known := sorted(folder.glob("*x*.npz"))):
        if (folder / f"{size}.npz") not in known:
            raise UserError(
                f"{url} has no {size}.npz: `fitv2 evaluate PHOTOS --size {size} --save-statistics` makes it"
            )
        url = str(folder / f"{size}.npz")
    if not url.endswith(".npz"):
        return {"source": url, "at_most": most}
    try:
        with open(url, "rb") as file:
            return {"source": url, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise UserError(f"cannot read the reference {url}: {error.strerror}") from error


def check_reference(url: str, network: FeatureNetwork, size: int) -> None:
    """Raises UserError if ``url`` is an .npz that is not of this network, whose features have ``size``."""
    if not url.endswith(".npz"):
        return
    arrays = read_npz(url, ("network", "mu"))
    _check_digest(url, arrays, network)
    mean = arrays.get("mu", np.zeros(size))
    if mean.shape != (size,):
        raise UserError(
            f"the network gives {size} features and {url} is of {mean.size}: use the network that it was made with"
        )


def open_reference(
    url: str, size: tuple[int, int] | None, network: FeatureNetwork | None, most: int, vae: str = ""
) -> Reference:
    """The reference in an .npz, or of at most ``most`` of the pictures at ``url``, prepared as ``open_pictures`` says.

    Raises:
        UserError: there is none, it is of another network, or a network is needed.
    """
    if not url.endswith(".npz"):
        pictures = open_pictures(url, size, most, vae)
        return reference_of(measure_pictures(pictures, network), url, pictures.size)
    arrays = read_npz(url)
    if network:
        _check_digest(url, arrays, network)
    if "mu" not in arrays:
        if "pool" in arrays:
            return reference_of(Features.from_arrays(arrays, url), url, None)
        pictures = pictures_of_array(url, arrays.get(ARRAY), most)
        return reference_of(measure_pictures(pictures, network), url, pictures.size)
    real = arrays.get("pool")
    if real is None and network and ARRAY in arrays:
        real = measure_pictures(pictures_of_array(url, arrays[ARRAY], NEIGHBOUR_IMAGES), network).pool
    found = arrays[ARRAY].shape[1:3] if ARRAY in arrays else None
    return Reference(url, _gaussian(arrays, "", url), _gaussian(arrays, "_s", url), real, found)


def reference_of(features: Features, source: str, size: tuple[int, int] | None) -> Reference:
    """The statistics of real images with these features. Raises UserError if they are too few, or not finite."""
    spatial = None if features.spatial is None else Gaussian.of(features.spatial, "spatial features")
    rows = spread_rows(len(features), NEIGHBOUR_IMAGES)
    return Reference(source, Gaussian.of(features.pool, "pool features"), spatial, features.pool[rows], size)


def save_statistics(file: str, reference: Reference, pictures: Pictures | None, network: FeatureNetwork | None) -> None:
    """Writes ``file``, an .npz as the module's docstring says, whole or not at all."""
    arrays = {"mu": reference.pool.mean, "sigma": reference.pool.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if pictures is not None:
        rows = set(spread_rows(pictures.count, NEIGHBOUR_IMAGES).tolist())
        arrays[ARRAY] = np.stack([picture for i, picture in enumerate(pictures.read()) if i in rows])
    if reference.features is not None:
        arrays["pool"] = reference.features
    if network is not None:
        arrays["network"] = np.array(network.digest)
    try:
        with atomic_write(file, durable=False) as out:
            out.write(npz_bytes(arrays))
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def measure_pictures(pictures: Pictures, network: FeatureNetwork | None) -> Features:
    """Features of all of them, with a progress bar."""
    if network is None:
        raise UserError(f"{pictures.source} holds pictures: give the network that makes features of them as --network")
    parts, batch = [], []
    bar = tqdm(pictures.read(), pictures.source, pictures.count, unit="image", dynamic_ncols=True)
    for i, picture in enumerate(bar, 1):
        batch.append(picture)
        if len(batch) == _BATCH or i == pictures.count:
            parts.append(network(np.stack(batch)))
            batch = []
    if not parts:
        raise UserError(f"{pictures.source} holds no pictures")
    return Features.joined(parts)


def _check_digest(url: str, arrays: dict[str, np.ndarray], network: FeatureNetwork) -> None:
    digest = str(arrays.get("network", network.digest))  # published files do not say
    if digest != network.digest:
        raise UserError(f"{url} is of the network {digest:.16}, yours is {network.digest:.16}: make the reference anew")


def _gaussian(arrays: dict[str, np.ndarray], suffix: str, where: str) -> Gaussian | None:
    names = f"mu{suffix}", f"sigma{suffix}"
    if not suffix or all(name in arrays for name in names):
        if missing := [name for name in names if name not in arrays]:
            raise UserError(f"{where} lacks {missing[0]}: it is no reference in ADM's format")
        found = Gaussian(*(np.asarray(arrays[name], np.float64) for name in names))
        found.check(where)
        return found
    return None
