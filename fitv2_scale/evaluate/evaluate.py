"""`fitv2 evaluate`: of weights, whose images all ranks make and the first one measures; or of pictures that are there.

Measuring comes after the ranks have parted: the figures of 50,000 images take the first one minutes, and no rank waits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_sharding.errors import UserError
from data_sharding.storage.byte_ranges import exists
from data_sharding.storage.open_store import open_store
from data_sharding.storage.store import Store
from fitv2_scale.checkpoint.init_from import is_weights
from fitv2_scale.config.model import PIXELS_PER_TOKEN, parse_size
from fitv2_scale.evaluate.feature_network import FeatureNetwork
from fitv2_scale.evaluate.features import Features, npz_bytes, read_npz
from fitv2_scale.evaluate.generated_features import Cell, collect_features, make_features
from fitv2_scale.evaluate.image_sets import open_pictures
from fitv2_scale.evaluate.reference_statistics import (
    Reference,
    check_reference,
    measure_pictures,
    open_reference,
    reference_identity,
    reference_of,
    save_statistics,
)
from fitv2_scale.evaluate.results import FOLDER, measure, read_result, write_result
from fitv2_scale.evaluate.sampling.load_weights import Weights, opened
from fitv2_scale.parallel.world import join
from fitv2_scale.run.log import now
from fitv2_scale.run.reference import split_reference
from fitv2_scale.run.run import Run


@dataclass(frozen=True)
class Means:
    """What figures are made with, as on the command line."""

    network: str | None = None
    network_sha256: str | None = None
    reference: str | None = None
    reference_images: int = 50_000
    vae: str = ""
    keep_features: bool = False

    def load_network(self, device: torch.device | str) -> FeatureNetwork | None:
        return FeatureNetwork.load(self.network, self.network_sha256, device) if self.network else None

    def open_reference(self, size: tuple[int, int] | None, network: FeatureNetwork | None) -> Reference:
        return open_reference(self._reference, size, network, self.reference_images, self.vae)

    def identity(self, size: str) -> dict[str, Any]:
        return reference_identity(self._reference, size, self.reference_images)

    @property
    def _reference(self) -> str:
        if not self.reference:
            raise UserError(
                "give what to compare with as --reference: an .npz as ADM's, a folder of pictures, a dataset"
            )
        return self.reference


@dataclass(frozen=True)
class Evaluated:
    """``results`` in the order of the cells; on ranks other than the first None."""

    store: Store
    step: str
    results: list[dict[str, Any]] | None
    run: Run | None


def is_network(source: str) -> bool:
    """Whether ``source`` is a run or a file of weights, and not pictures or features."""
    if source.endswith(".npz"):
        return False
    if split_reference(source)[1] is not None and not exists(source):
        return True  # and if there is no such run, that is the error to report
    return is_weights(source) or exists(f"{source.rstrip('/')}/run.json")


def evaluate_weights(
    source: str,
    cells_of: Callable[[Weights], list[Cell]],
    means: Means,
    *,
    config_file: str | None = None,
    overrides: list[str] | None = None,
    out: str | None = None,
) -> Evaluated:
    """Measures each cell and keeps the result in the run, or in ``out``. What is there already is not made again.

    Raises:
        UserError: see ``opened``, ``FeatureNetwork.load``, ``check_reference``, ``measure``.
    """
    with join() as world, opened(source, world, config_file, overrides) as weights:
        run = None if weights.step is None else Run.open(split_reference(weights.name)[0])
        if run is None and not out:
            raise UserError(f"{source} is no run that could keep the figures: give a folder as --out")
        store, step = (open_store(out) if out else run.store), Path(source).stem if run is None else str(weights.step)
        network = means.load_network(world.device)
        if network is None:
            raise UserError("give the network that makes features of pictures as --network, and its --network-sha256")
        cells = cells_of(weights)
        world.run_on_rank0(lambda: [_check(cell, means, network) for cell in cells])
        work = [_Work.of(cell, weights, network, step) for cell in cells]
        for piece in work:
            if not world.run_on_rank0(lambda p=piece: p.result(store, means)):
                make_features(weights, piece.cell, network, store, piece.folder)
        first, name = world.is_first, weights.name
    if not first:
        return Evaluated(store, step, None, run)
    references: dict[tuple, Reference] = {}
    results = [_finish(piece, store, means, network, references, name) for piece in work]
    return Evaluated(store, step, results, run)


@dataclass(frozen=True)
class _Work:
    cell: Cell
    name: str
    step: str

    @classmethod
    def of(cls, cell: Cell, weights: Weights, network: FeatureNetwork, step: str) -> "_Work":
        return cls(cell, cell.name(weights.name, network.digest), step)

    @property
    def folder(self) -> str:
        return f"{FOLDER}/{self.step}/{self.name}"

    def result(self, store: Store, means: Means) -> dict[str, Any] | None:
        """What was found earlier, against the same reference."""
        found = read_result(store, self.step, self.name)
        same = found is not None and means.identity(self.cell.size).items() <= found["reference"].items()
        return found if same else None


def _check(cell: Cell, means: Means, network: FeatureNetwork) -> None:
    """Finds out what is wrong before any image is made."""
    height, width = (side * PIXELS_PER_TOKEN for side in parse_size(cell.size))
    size = network(np.zeros((1, height, width, 3), np.uint8)).pool.shape[1]
    if cell.images <= size:
        raise UserError(f"{cell.images} images are too few for a covariance of {size} features: give --images 50000")
    check_reference(means.identity(cell.size)["source"], network, size)


def _finish(
    piece: _Work, store: Store, means: Means, network: FeatureNetwork, references: dict[tuple, Reference], name: str
) -> dict[str, Any]:
    if (found := piece.result(store, means)) is not None:
        store.delete_tree(piece.folder)  # of an evaluation that was killed just before it did so
        return found
    features, nfe = collect_features(piece.cell, store, piece.folder)
    identity = means.identity(piece.cell.size)
    size = tuple(side * PIXELS_PER_TOKEN for side in parse_size(piece.cell.size))
    key = (identity["source"], size)
    if key not in references:
        references[key] = open_reference(identity["source"], size, network, means.reference_images, means.vae)
    figures = measure(features, references[key], network.device)
    step = int(piece.step) if piece.step.isdigit() else None
    about = {"step": step, "weights": name, "label": piece.cell.label, "time": now(), "network": network.digest}
    result = about | piece.cell.record() | {"nfe": nfe} | figures
    result["reference"] |= identity
    if means.keep_features:
        store.put(f"{piece.folder}.npz", npz_bytes(features.arrays()))
    write_result(store, piece.step, piece.name, result)
    store.delete_tree(piece.folder)
    return result


def evaluate_pictures(source: str, size: str | None, means: Means, save: str | None) -> dict[str, Any]:
    """Figures of pictures or features against the reference; with ``save``, an .npz, also their own statistics.

    Raises:
        UserError: see ``open_pictures``, ``FeatureNetwork.load``, ``open_reference``, ``measure``.
    """
    network = means.load_network("cuda" if torch.cuda.is_available() else "cpu")
    pixels = None if size is None else tuple(side * PIXELS_PER_TOKEN for side in parse_size(size))
    features, pictures = _features_of(source, pixels, means, network)
    shape = pixels if pictures is None else pictures.size
    result: dict[str, Any] = {"source": source, "images": len(features)}
    result |= {"size": None if shape is None else "{}x{}".format(*shape), "network": network and network.digest}
    if save:
        save_statistics(save, reference_of(features, source, shape), pictures, network)
        result["saved"] = save
    if means.reference or not save:
        result |= measure(features, means.open_reference(shape, network), "cpu" if network is None else network.device)
    return result


def _features_of(source: str, size: tuple[int, int] | None, means: Means, network: FeatureNetwork | None):
    arrays = read_npz(source) if source.endswith(".npz") else {}
    if "pool" in arrays and "mu" not in arrays:
        return Features.from_arrays(arrays, source), None
    pictures = open_pictures(source, size, means.reference_images, means.vae)
    return measure_pictures(pictures, network), pictures
