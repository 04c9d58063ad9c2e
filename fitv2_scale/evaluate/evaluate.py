"""`fitv2 evaluate`: metrics of weights, whose images all ranks generate and rank 0 measures; or of existing images.

Rank 0 measures after the process group has been left: the metrics of 50,000 images take minutes, and no rank waits.
"""

import json
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
from fitv2_scale.config.model import parse_pixels
from fitv2_scale.evaluate.feature_network import FeatureNetwork
from fitv2_scale.evaluate.features import Features, is_npz, npz_bytes, read_npz
from fitv2_scale.evaluate.generated_features import Cell, collect_features, generate_features
from fitv2_scale.evaluate.image_sets import open_image_set
from fitv2_scale.evaluate.reference_statistics import (
    Reference,
    check_reference,
    features_of_images,
    open_reference,
    reference_for,
    reference_from_features,
    reference_identity,
    save_statistics,
)
from fitv2_scale.evaluate.results import FOLDER, measure, read_result, write_result
from fitv2_scale.evaluate.sampling.load_weights import Weights, open_weights
from fitv2_scale.parallel.agreement import Facts, agree, read_alike
from fitv2_scale.parallel.rank_facts import software_facts
from fitv2_scale.parallel.world import join
from fitv2_scale.run.log import now
from fitv2_scale.run.reference import split_reference
from fitv2_scale.run.run import Run
from fitv2_scale.run.weights_source import is_weights


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
        url = reference_for(self.reference_url, None if size is None else "{}x{}".format(*size))
        return open_reference(url, size, network, self.reference_images, self.vae)

    @property
    def reference_url(self) -> str:
        """Raises UserError if none is given."""
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
    if is_npz(source):
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
    None on ranks other than 0. ``facts``: what all ranks must agree in, besides software and device.

    Raises:
        UserError: the ranks were not told the same; and see ``open_weights``, ``FeatureNetwork.load``,
            ``check_reference``, ``measure``.
    """
    with ExitStack() as stack:
        world = stack.enter_context(join())
        agree(world, (facts or {}) | software_facts(world.device))
        weights = stack.enter_context(open_weights(source, world, config_file, overrides))
        run = weights.run
        if out:
            store = open_store(out)
        elif run is not None:
            store = run.store
        else:
            raise UserError(f"{source} is not a run, which would store the metrics: give a folder as --out")
        network, cells = read_alike(world, lambda: _read_request(weights, cells_of, options))
        references = _References(options, network)
        jobs = world.run_on_rank0(lambda: _jobs(cells, weights, network, references))
        for job in jobs:
            if not world.run_on_rank0(lambda job=job: job.result(store)):
                generate_features(weights, job.cell, network, store, job.folder)
        first = world.is_first
    if not first:
        return None
    results = [_measure_cell(job, store, options, network, references) for job in jobs]
    return Evaluation(store, jobs[0].step, results, run)


class _References:
    """The references of an evaluation, on rank 0: each is identified and opened once."""

    def __init__(self, options: EvaluationOptions, network: FeatureNetwork):
        self._options, self._network = options, network
        self._identities: dict[str, dict[str, Any]] = {}
        self._opened: dict[tuple, Reference] = {}

    def identity(self, size: str, features: int) -> dict[str, Any]:
        """The reference for images of ``size``, as results record it. Raises UserError if there is none, or if it
        cannot be compared with so many ``features``."""
        if (url := reference_for(self._options.reference_url, size)) not in self._identities:
            self._identities[url] = self._identify(url)
            check_reference(url, self._network, features)
        return self._identities[url]

    def open(self, identity: dict[str, Any], size: str) -> Reference:
        """Raises UserError if it is no longer the one of ``identity``: images take hours to generate."""
        key, options = (identity["source"], parse_pixels(size)), self._options
        if key not in self._opened:
            self._opened[key] = open_reference(*key, self._network, options.reference_images, options.vae)
            if self._identify(identity["source"]) != identity:
                raise UserError(f"{identity['source']} was changed meanwhile: run the same command again")
        return self._opened[key]

    def _identify(self, url: str) -> dict[str, Any]:
        return reference_identity(url, self._options.reference_images, self._options.vae)


def _read_request(
    weights: Weights, cells_of: Callable[[Weights], list[Cell]], options: EvaluationOptions
) -> tuple[tuple[FeatureNetwork, list[Cell]], Facts]:
    """The feature network and what to measure, as this rank reads them, and the facts in which all must agree."""
    network = options.load_network(weights.world.device)
    if network is None:
        raise UserError("give the network that computes features of images as --network, and its --network-sha256")
    cells = cells_of(weights)
    facts = {f"cell {cell.label}": cell.record() | {"labels": cell.labels} for cell in cells}
    digests = {"digest of --network": network.digest, "digest of the codec": weights.codec().digest}
    return (network, cells), digests | facts


@dataclass(frozen=True)
class _CellJob:
    """A cell, what its result says of the weights, the name of its objects, and its reference."""

    cell: Cell
    about: dict[str, Any]
    step: str  # of the weights; of a file, its name and digest
    name: str
    former_name: str | None  # under which an earlier version stored the result of a run's weights
    reference: dict[str, Any]

    @property
    def folder(self) -> str:
        return f"{FOLDER}/{self.step}/{self.name}"

    def result(self, store: Store) -> dict[str, Any] | None:
        """The stored result, if there is one against the same reference, wherever that lies."""
        wanted = {key: value for key, value in self.reference.items() if key != "source"}
        for name in filter(None, (self.name, self.former_name)):
            found = read_result(store, self.step, name)
            if found is not None and wanted.items() <= found["reference"].items():
                return found
        return None

    def delete_features(self, store: Store) -> None:
        for name in filter(None, (self.name, self.former_name)):
            store.delete_tree(f"{FOLDER}/{self.step}/{name}")


def _jobs(cells: list[Cell], weights: Weights, network: FeatureNetwork, references: _References) -> list[_CellJob]:
    """Raises UserError for bad input before any image is generated."""
    codec, run = weights.codec().digest, weights.run
    step = str(weights.step) if run else f"{Path(weights.name).stem}-{weights.digest:.8}"
    about = {"step": weights.step, "weights": weights.name, "weights_digest": weights.digest, "codec": codec}
    # Keys at their defaults are left out, so that a version with more of them finds the same name.
    model = json.dumps(weights.config.model.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    jobs = []
    for cell in cells:
        reference = references.identity(cell.size, _feature_count(cell, network))
        name = cell.name(weights.digest, model, codec, network.digest)
        former = cell.name(weights.name, network.digest) if run else None
        jobs.append(_CellJob(cell, about, step, name, former, reference))
    return jobs


def _feature_count(cell: Cell, network: FeatureNetwork) -> int:
    """Raises UserError if the cell has too few images for so many features."""
    height, width = parse_pixels(cell.size)
    size = network(np.zeros((1, height, width, 3), np.uint8)).pool.shape[1]
    if cell.images <= size:
        raise UserError(f"{cell.images} images are too few for a covariance of {size} features: give --images 50000")
    return size


def _measure_cell(
    job: _CellJob, store: Store, options: EvaluationOptions, network: FeatureNetwork, references: _References
) -> dict[str, Any]:
    """Computes and stores the metrics of a cell, and deletes the features of its images."""
    if (found := job.result(store)) is not None:
        job.delete_features(store)  # left behind by an evaluation that was killed before it deleted them
        return found
    features, nfe = collect_features(job.cell, store, job.folder)
    metrics = measure(features, references.open(job.reference, job.cell.size), network.device)
    about = job.about | {"label": job.cell.label, "time": now(), "network": network.digest}
    result = about | job.cell.record() | {"class_numbers": job.cell.class_numbers, "nfe": nfe} | metrics
    result["reference"] |= job.reference
    if options.keep_features:
        store.put(f"{job.folder}.npz", npz_bytes(features.arrays()))
    write_result(store, job.step, job.name, result)
    job.delete_features(store)
    return result


def evaluate_images(
    source: str, size: str | None, options: EvaluationOptions, save: str | None, device: torch.device
) -> dict[str, Any]:
    """Metrics of images or features against the reference, on ``device``. With ``save``, an .npz, also writes their own
    statistics.

    Raises:
        UserError: see ``open_image_set``, ``FeatureNetwork.load``, ``open_reference``, ``measure``.
    """
    network = options.load_network(device)
    pixels = None if size is None else parse_pixels(size)
    features, images = _features_of(source, pixels, options, network)
    shape = pixels if images is None else images.size
    result: dict[str, Any] = {"source": source, "images": len(features)}
    result |= {"size": None if shape is None else "{}x{}".format(*shape), "network": network and network.digest}
    result |= {} if images is None else images.besides()
    if save:
        save_statistics(save, reference_from_features(features, source, shape), images, network)
        result["saved"] = save
    if options.reference or not save:
        result |= measure(features, options.open_reference(shape, network), network.device if network else "cpu")
    return result


def _features_of(source: str, size: tuple[int, int] | None, options: EvaluationOptions, network: FeatureNetwork | None):
    arrays = read_npz(source) if is_npz(source) else {}
    if "pool" in arrays and "mu" not in arrays:
        return Features.from_arrays(arrays, source), None
    images = open_image_set(source, size, options.reference_images, options.vae)
    if size is not None and images.size not in (None, size):
        height, width = images.size
        raise UserError(f"{source} holds images of {height}x{width}, and they are not resized: leave out --size")
    return features_of_images(images, network), images
