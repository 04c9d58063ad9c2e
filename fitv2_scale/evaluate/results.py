"""The results of an evaluation, and their files.

In the RUN (or the folder given as --out):

    evaluations/<step>/<cell>.json    one set of images: how they were generated, metrics, reference, conventions
    evaluations/<step>.json           the step: {"step": 400000, "fid": 26.0, "sfid": …, …, "cells": [all of the above]}

The metrics at the top of ``<step>.json`` are those of the first cell, in this order: most images, then square, small,
little guidance, most evaluations. To get one FID per step (`fitv2 curves`), read ``fid`` there. <step> is a plain
number, without leading zeros; of a weights file, it is the file's name and the first digits of its digest.
"""

from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field

from data_sharding.errors import DataError, UserError
from data_sharding.storage.records import Count, Number, Shape, Time
from data_sharding.storage.store import Store
from fitv2_scale.config.model import parse_pixels
from fitv2_scale.evaluate.features import Features
from fitv2_scale.evaluate.fid import IS_SPLIT, Gaussian, frechet_distance, inception_score
from fitv2_scale.evaluate.precision_recall import NEIGHBOURS, precision_recall
from fitv2_scale.evaluate.reference_statistics import NEIGHBOUR_IMAGES, Reference

METRICS = ("fid", "sfid", "is", "precision", "recall")
FOLDER = "evaluations"


def _size(text: str) -> str:
    try:
        parse_pixels(text)
    except UserError as error:
        raise ValueError(str(error)) from error
    return text


_Metric = Number | None


class _Reference(Shape):
    source: str
    size: str | None


class _Cell(Shape):
    """A result, of any version."""

    label: str
    step: Count | None
    time: Time
    weights: str
    network: str
    images: Count
    size: Annotated[str, AfterValidator(_size)]
    cfg: Number
    guidance_interval: Annotated[list[Number], Field(min_length=2, max_length=2)] | None = None
    solver: str
    rope: str
    nfe: Number
    fid: _Metric
    sfid: _Metric
    inception_score: _Metric = Field(alias="is")
    precision: _Metric
    recall: _Metric
    reference: _Reference


def measure(features: Features, reference: Reference, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The metrics of images with these features, and the conventions that they follow. A metric is None if features or
    reference lack what it needs.

    Raises:
        UserError: too few images, features that are not finite, or of another network than the reference's.
    """
    spatial, real = features.spatial, reference.features
    found: dict[str, float | None] = dict.fromkeys(METRICS)
    found["fid"] = frechet_distance(Gaussian.of(features.pool, "pool features"), reference.pool)
    if spatial is not None and reference.spatial is not None:
        found["sfid"] = frechet_distance(Gaussian.of(spatial, "spatial features"), reference.spatial)
    if features.probabilities is not None:
        found["is"] = inception_score(features.probabilities)
    if real is not None:
        found["precision"], found["recall"] = precision_recall(features.pool, real, device=device)
    conventions = {
        "arithmetic": "float64",
        "pool": features.pool.shape[1],
        "spatial": None if spatial is None else spatial.shape[1],
        "is_split": IS_SPLIT,
        "neighbours": NEIGHBOURS,
        "neighbour_images": None if real is None else min(len(real), NEIGHBOUR_IMAGES),
    }
    return found | {"reference": reference.record(), "conventions": conventions}


def guidance(result: dict[str, Any]) -> str:
    """The guidance of a result, as in "cfg 1.5" or "cfg 1.5 from t = 0.2 to 0.8"."""
    within = result.get("guidance_interval")
    return f"cfg {result['cfg']:g}" + (" from t = {:g} to {:g}".format(*within) if within else "")


def read_result(store: Store, step: str, cell: str) -> dict[str, Any] | None:
    """The stored result of a cell, None if there is none. Raises DataError if it is damaged."""
    return store.read_json(_path(step, cell), _Cell, "remove it, and it is measured again")


def write_result(store: Store, step: str, cell: str, result: dict[str, Any]) -> None:
    """Writes the result of a cell, and updates ``<step>.json``."""
    store.put_json(_path(step, cell), result, indent=1)
    names = [path for path in store.list(f"{FOLDER}/{step}/") if path.endswith(".json")]
    cells = sorted(filter(None, (_read_cell(store, path) for path in names)), key=_rank)
    head = {name: cells[0][name] for name in ("step", "weights", *METRICS)}
    store.put_json(f"{FOLDER}/{step}.json", head | {"cells": cells}, indent=1)


def _read_cell(store: Store, path: str) -> dict[str, Any] | None:
    """The result at ``path``; None if it is something else, such as what a desktop leaves in each folder."""
    try:
        return store.read_json(path, _Cell)
    except DataError:
        return None


def _rank(cell: dict[str, Any]) -> tuple:
    height, width = parse_pixels(cell["size"])
    return -cell["images"], height != width, height * width, cell["cfg"], -cell["nfe"]


def _path(step: str, cell: str) -> str:
    return f"{FOLDER}/{step}/{cell}.json"
