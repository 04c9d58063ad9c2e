"""`fitv2 evaluate`: metrics of weights, whose images all ranks generate and rank 0 measures; or of existing images.

Rank 0 measures after the process group has been left: the metrics of 50,000 images take minutes, and no rank waits.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_sharding.errors import UserError
from data_sharding.storage.files import exists
from data_sharding.storage.open_store import open_store
from data_sharding.storage.store import Store
from fitv2_scale.checkpoint.init_from import is_weights
from fitv2_scale.config.model import PIXELS_PER_TOKEN, parse_size
from fitv2_scale.evaluate.feature_network import FeatureNetwork
from fitv2_scale.evaluate.features import Features, npz_bytes, read_npz
from fitv2_scale.evaluate.generated_features import Cell, collect_features, generate_features
from fitv2_scale.evaluate.image_sets import open_image_set
from fitv2_scale.evaluate.reference_statistics import (
    Reference,
    check_reference,
    features_of_images,
    open_reference,
    reference_from_features,
    reference_identity,
    save_statistics,
)
from fitv2_scale.evaluate.results import FOLDER, measure, read_result, write_result
from fitv2_scale.evaluate.sampling.load_weights import Weights, open_weights
from fitv2_scale.parallel.agreement import Facts, agree, read_alike
from fitv2_scale.parallel.world import join
from fitv2_scale.run.log import now
from fitv2_scale.run.reference import split_reference
from fitv2_scale.run.run import Run


@dataclass(frozen=True)
class EvaluationOptions:
    """The feature network, the reference and other options of the command line."""

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
                "give the images to compare with as --reference: an .npz in ADM's format, a folder or a dataset"
            )
        return self.reference


@dataclass(frozen=True)
class Evaluation:
    """``results`` are in the order of the cells."""

    store: Store
    step: str
    results: list[dict[str, Any]]
    run: Run | None


def is_network(source: str) -> bool:
    """Whether ``source`` is a run or a file of weights, rather than images or features."""
    if source.endswith(".npz"):
        return False
    if split_reference(source)[1] is not None and not exists(source):
        return True  # and if there is no such run, that is the error to report
    return is_weights(source) or exists(f"{source.rstrip('/')}/run.json")


def evaluate_weights(
    source: str,
    cells_of: Callable[[Weights], list[Cell]],
    options: EvaluationOptions,
    *,
    config_file: str | None = None,
    overrides: list[str] | None = None,
    out: str | None = None,
    facts: Facts | None = None,
) -> Evaluation | None:
    """Measures each cell and stores the result in the run, or in ``out``. Existing results are not computed again.
    None on ranks other than 0. ``facts``: what else all ranks must agree in.

    Raises:
        UserError: the ranks were not told the same; and see ``open_weights``, ``FeatureNetwork.load``,
            ``check_reference``, ``measure``.
    """
    with ExitStack() as stack:
        world = stack.enter_context(join())
        agree(world, facts or {})
        weights = stack.enter_context(open_weights(source, world, config_file, overrides))
        run = None if weights.step is None else Run.open(split_reference(weights.name)[0])
        if out:
            store = open_store(out)
        elif run is not None:
            store = run.store
        else:
            raise UserError(f"{source} is not a run, which would store the metrics: give a folder as --out")
        step = Path(source).stem if run is None else str(weights.step)
        network, cells = read_alike(world, lambda: _read_request(weights, cells_of, options))
        world.run_on_rank0(lambda: [_check(cell, options, network) for cell in cells])
        jobs = [_CellJob.of(cell, weights, network, step) for cell in cells]
        for job in jobs:
            if not world.run_on_rank0(lambda job=job: job.result(store, options)):
                generate_features(weights, job.cell, network, store, job.folder)
        first, name = world.is_first, weights.name
    if not first:
        return None
    references: dict[tuple, Reference] = {}
    results = [_measure_cell(job, store, options, network, references, name) for job in jobs]
    return Evaluation(store, step, results, run)


def _read_request(
    weights: Weights, cells_of: Callable[[Weights], list[Cell]], options: EvaluationOptions
) -> tuple[tuple[FeatureNetwork, list[Cell]], Facts]:
    """The feature network and what to measure, as this rank reads them, and the facts in which all must agree."""
    network = options.load_network(weights.world.device)
    if network is None:
        raise UserError("give the network that computes features of images as --network, and its --network-sha256")
    cells = cells_of(weights)
    facts = {f"cell {cell.label}": cell.record() | {"labels": cell.labels} for cell in cells}
    return (network, cells), {"digest of --network": network.digest} | facts


@dataclass(frozen=True)
class _CellJob:
    """A cell with the name of its objects and the step of the weights."""

    cell: Cell
    name: str
    step: str

    @classmethod
    def of(cls, cell: Cell, weights: Weights, network: FeatureNetwork, step: str) -> "_CellJob":
        return cls(cell, cell.name(weights.name, network.digest), step)

    @property
    def folder(self) -> str:
        return f"{FOLDER}/{self.step}/{self.name}"

    def result(self, store: Store, options: EvaluationOptions) -> dict[str, Any] | None:
        """The stored result, if there is one against the same reference."""
        found = read_result(store, self.step, self.name)
        same = found is not None and options.identity(self.cell.size).items() <= found["reference"].items()
        return found if same else None


def _pixels(size: str) -> tuple[int, int]:
    rows, columns = parse_size(size)
    return rows * PIXELS_PER_TOKEN, columns * PIXELS_PER_TOKEN


def _check(cell: Cell, options: EvaluationOptions, network: FeatureNetwork) -> None:
    """Raises UserError for bad input before any image is generated."""
    height, width = _pixels(cell.size)
    size = network(np.zeros((1, height, width, 3), np.uint8)).pool.shape[1]
    if cell.images <= size:
        raise UserError(f"{cell.images} images are too few for a covariance of {size} features: give --images 50000")
    check_reference(options.identity(cell.size)["source"], network, size)


def _measure_cell(
    job: _CellJob,
    store: Store,
    options: EvaluationOptions,
    network: FeatureNetwork,
    references: dict[tuple, Reference],
    name: str,
) -> dict[str, Any]:
    """Computes and stores the metrics of a cell, and deletes the features of its images."""
    if (found := job.result(store, options)) is not None:
        store.delete_tree(job.folder)  # left behind by an evaluation that was killed before it deleted them
        return found
    features, nfe = collect_features(job.cell, store, job.folder)
    identity = options.identity(job.cell.size)
    size = _pixels(job.cell.size)
    key = (identity["source"], size)
    if key not in references:
        references[key] = open_reference(identity["source"], size, network, options.reference_images, options.vae)
    metrics = measure(features, references[key], network.device)
    step = int(job.step) if job.step.isdigit() else None
    about: dict[str, Any] = {
        "step": step,
        "weights": name,
        "label": job.cell.label,
        "time": now(),
        "network": network.digest,
    }
    result = about | job.cell.record() | {"nfe": nfe} | metrics
    result["reference"] |= identity
    if options.keep_features:
        store.put(f"{job.folder}.npz", npz_bytes(features.arrays()))
    write_result(store, job.step, job.name, result)
    store.delete_tree(job.folder)
    return result


def evaluate_images(source: str, size: str | None, options: EvaluationOptions, save: str | None) -> dict[str, Any]:
    """Metrics of images or features against the reference. With ``save``, an .npz, also writes their own statistics.

    Raises:
        UserError: see ``open_image_set``, ``FeatureNetwork.load``, ``open_reference``, ``measure``.
    """
    network = options.load_network("cuda" if torch.cuda.is_available() else "cpu")
    pixels = None if size is None else _pixels(size)
    features, images = _features_of(source, pixels, options, network)
    shape = pixels if images is None else images.size
    result: dict[str, Any] = {"source": source, "images": len(features)}
    result |= {"size": None if shape is None else "{}x{}".format(*shape), "network": network and network.digest}
    if images is not None and images.left_out:
        result["left_out"] = images.left_out
    if save:
        save_statistics(save, reference_from_features(features, source, shape), images, network)
        result["saved"] = save
    if options.reference or not save:
        device = "cpu" if network is None else network.device
        result |= measure(features, options.open_reference(shape, network), device)
    return result


def _features_of(source: str, size: tuple[int, int] | None, options: EvaluationOptions, network: FeatureNetwork | None):
    arrays = read_npz(source) if source.endswith(".npz") else {}
    if "pool" in arrays and "mu" not in arrays:
        return Features.from_arrays(arrays, source), None
    images = open_image_set(source, size, options.reference_images, options.vae)
    return features_of_images(images, network), images
