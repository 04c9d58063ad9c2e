"""Reads the curves of runs from their journals or from MLflow: committed steps only, each once.

Names of metrics are those of the journal. Cumulative ``images``, ``tokens``, ``flops`` and ``gpu_hours`` are read from
runs that record them; for older runs, images are steps times the batch, and FLOPs those of images with the mean
number of tokens that the run reports.
"""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, overload

import numpy as np

from data_sharding.errors import DataError, UserError
from data_sharding.storage.records import Count, Number, Shape
from data_sharding.storage.store import Store
from fitv2_scale.config.families import network_name
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.counts import forward_flops, parameter_count
from fitv2_scale.planning.scaling.meaning import Meaning, Origin, meaning_of
from fitv2_scale.run.run import Attempt, Run
from fitv2_scale.tracking import journal

log = logging.getLogger(__name__)

AXES = ("steps", "images", "flops", "gpu_hours")
LOSSES = ("val_loss_ema", "val_loss", "loss")  # runs are compared by the first one that all of them have
_RATES = ("images_per_second", "tokens_per_second")
_CUMULATIVE = ("images", "tokens", "flops", "gpu_hours")


@dataclass(frozen=True)
class Series:
    """One metric: ``steps``, ascending, and ``values``, both (points,); no NaN, no infinity."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Curve:
    """The measurements of one run."""

    name: str
    model: ModelConfig
    batch: int  # images per step
    warmup: int  # steps
    series: Mapping[str, Series]
    meaning: Meaning  # of its losses

    @property
    def parameters(self) -> int:
        return parameter_count(self.model)

    @property
    def size(self) -> str:
        """An identifier that is equal for runs of the same network."""
        return self.model.model_dump_json()

    @property
    def objective(self) -> str:
        return self.meaning.get("objective", "flow")

    @property
    def network(self) -> str:
        """As FiTv2-B/2."""
        return network_name(self.model, self.objective)

    @property
    def last(self) -> int:
        """The last step with a measurement."""
        return int(max((s.steps[-1] for s in self.series.values()), default=0))

    def flops_an_image(self) -> float:
        """FLOPs to train on an image: three forward passes."""
        return 3.0 * forward_flops(self.model, round(self._mean_tokens()))

    @overload
    def along(self, axis: Literal["steps", "images", "flops"], steps: np.ndarray) -> np.ndarray: ...

    @overload
    def along(self, axis: str, steps: np.ndarray) -> np.ndarray | None: ...

    def along(self, axis: str, steps: np.ndarray) -> np.ndarray | None:
        """``steps`` converted to another axis of AXES; None if this run did not record it."""
        if axis == "steps":
            return steps.astype(float)
        if axis in self.series:
            known = self.series[axis]
            return np.interp(steps, [0, *known.steps], [0, *known.values])
        if axis == "images":
            return steps * float(self.batch)
        return steps * float(self.batch) * self.flops_an_image() if axis == "flops" else None

    def _mean_tokens(self) -> float:
        images, tokens = (self.series.get(name) for name in _RATES)
        if "tokens" in self.series:
            tokens = self.series["tokens"]
            return float(tokens.values[-1] / self.along("images", tokens.steps[-1:])[0])
        if images is None or tokens is None or len(images.values) != len(tokens.values):
            return 256.0
        return float(np.median(tokens.values / images.values))


class _Reference(Shape):
    sha256: str | None = None
    digest: str | None = None
    at_most: Count | None = None


class _Cell(Shape):
    label: str
    step: Count
    fid: Number | None
    time: str = ""
    network: str | None = None
    reference: _Reference = _Reference()
    codec: str | None = None
    seed: Count | None = None
    classes: Count | None = None
    class_numbers: str | None = None
    guided_channels: str | None = None
    attention_scale: str | None = None
    atol: Number | None = None
    rtol: Number | None = None


class _Step(Shape):
    """evaluations/<step>.json, as far as a curve needs it; earlier versions wrote less."""

    cells: list[_Cell]


def is_fid(metric: str) -> bool:
    """Whether it is an FID of `fitv2 evaluate`: evaluate/<label>/fid."""
    return metric.startswith("evaluate/") and metric.endswith("/fid")


def from_journal(url: str) -> Curve:
    """The canonical curve of the run at ``url``. Raises UserError if there is no such run."""
    run = Run.open(url)
    begun = bool(run.parent or run.config.get("init_from"))
    points, (validation, grid) = _points(run)
    origin = Origin(run.recorded("datasets"), validation or run.recorded("validation"), begun, grid)
    return _curve(run.id, run.config, chain(points, _fids(run.store)), origin)


def _points(run: Run) -> tuple[list[tuple[str, int, float]], tuple[list[str], dict[str, int]]]:
    """The measurements in the journal as (name, step, value), and on what the validation losses among them were
    measured: digests and grid, empty where not known. Those that an earlier attempt measured on something else are
    left out."""
    found = [
        (record.end.attempt, (name, record.step, value))
        for record in journal.read(run)
        for name, value in (record.metrics or {}).items()
        if _wanted(name)
    ]
    validated = dict.fromkeys(attempt for attempt, (name, *_) in found if name.startswith("val_"))
    starts = {attempt: Attempt(attempt, run).read_start() for attempt in validated}
    held = {n: (start.get("validation", []), start.get("validation_grid", {})) for n, start in starts.items()}
    last = held[max(held)] if held else ([], {})
    other = {n for n, sides in held.items() if any(a and b and a != b for a, b in zip(sides, last, strict=True))}
    kept = [point for attempt, point in found if not (attempt in other and point[0].startswith("val_"))]
    if cut := len(found) - len(kept):
        log.warning("%s: %d validation losses on other images or times than the newest are left out", run.url, cut)
    return kept, last


def _fids(store: Store) -> Iterator[tuple[str, int, float]]:
    """The FIDs that `fitv2 evaluate` has written to a run: evaluations/<step>.json. Those of one curve were measured
    alike (see ``_conditions``); if there are several ways, the newest measurement decides which."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in store.list("evaluations/"):
        if re.fullmatch(r"evaluations/\d+\.json", path):
            for cell in _cells(store, path):
                found[cell["label"]] += [cell] if cell["fid"] is not None else []
    for label, cells in found.items():
        cells.sort(key=lambda cell: cell.get("time", ""))
        unlike = [_differing(cell, cells[-1]) for cell in cells]
        alike = [cell for cell, names in zip(cells, unlike, strict=True) if not names]
        if others := len(cells) - len(alike):
            names = ", ".join(sorted(set().union(*unlike)))
            log.warning("%s: %d FIDs of %s are left out: the newest has another %s", store.url, others, label, names)
        yield from ((f"evaluate/{label}/fid", cell["step"], cell["fid"]) for cell in alike)


def _cells(store: Store, path: str) -> list[dict[str, Any]]:
    try:
        return (store.read_json(path, _Step) or {"cells": []})["cells"]
    except DataError as error:
        log.warning("its FIDs are left out: %s", error)
        return []


def _differing(cell: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """In which conditions two FIDs differ, so far as they are known of both."""
    a, b = _conditions(cell), _conditions(other)
    return {name for name in a if None not in (a[name], b[name]) and a[name] != b[name]}


def _conditions(cell: dict[str, Any]) -> dict[str, Any]:
    """What an FID depends on, besides the weights and what its label tells. Earlier versions did not record all of it,
    and knew the references of a folder by path alone."""
    reference = cell.get("reference", {})
    names = ("network", "codec", "seed", "guided_channels", "attention_scale", "atol", "rtol")
    return {
        "reference": reference.get("sha256", reference.get("digest")),
        "number of reference images": reference.get("at_most"),
        "number of classes": cell.get("classes"),
        "choice of classes": cell.get("class_numbers"),
    } | {name.replace("_", " "): cell.get(name) for name in names}


def from_mlflow(uri: str, experiment: str) -> list[Curve]:
    """The curves of all training runs of an MLflow experiment. Raises UserError if there are none, or if the server
    fails."""
    # Not at the top: reading journals needs no mlflow.
    from fitv2_scale.tracking.mlflow_reader import ServerError, training_runs

    try:
        found = list(training_runs(uri, experiment, _wanted))
    except ServerError as error:
        raise UserError(f"cannot read the experiment {experiment} from MLflow: {error}") from error
    if not found:
        raise UserError(f"the experiment {experiment} has no training run yet: check its name and --uri")
    configs = [_nested(run.params) for run in found]
    origins = [
        Origin(run.datasets, pretrained=bool(run.parent or config.get("init_from")))
        for run, config in zip(found, configs, strict=True)
    ]
    return [_curve(run.name, config, run.points, of) for run, config, of in zip(found, configs, origins, strict=True)]


def _wanted(metric: str) -> bool:
    return metric in (*LOSSES, *_RATES, *_CUMULATIVE) or is_fid(metric)


def _curve(name: str, config: Mapping[str, Any], points: Iterable[tuple[str, int, float]], origin: Origin) -> Curve:
    try:
        model = ModelConfig.model_validate(config["model"])
        batch, warmup = int(config["batch"]["images"]), int(config["optimizer"]["warmup_steps"])
    except (KeyError, TypeError, ValueError) as error:  # pydantic's errors are ValueErrors
        raise UserError(
            f"the config of {name} does not describe its network ({type(error).__name__}): leave this run out"
        ) from error
    return Curve(name, model, batch, warmup, dict(_series(points)), meaning_of(config, origin))


def _series(points: Iterable[tuple[str, int, float]]) -> Iterator[tuple[str, Series]]:
    by_name: dict[str, dict[int, float]] = defaultdict(dict)
    for name, step, value in points:
        if np.isfinite(value):
            by_name[name][step] = value
    for name, values in by_name.items():
        steps = sorted(values)
        yield name, Series(np.array(steps), np.array([values[s] for s in steps]))


def _nested(params: Mapping[str, str]) -> dict[str, Any]:
    """{"model.depth": "6", "model.rope.mode": "none"} -> {"model": {"depth": 6, "rope": {"mode": "none"}}}"""
    tree: dict[str, Any] = {}
    for dotted, text in params.items():
        *parents, leaf = dotted.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        try:
            section[leaf] = json.loads(text)
        except ValueError:
            section[leaf] = text
    return tree


def common_loss(curves: Iterable[Curve]) -> str:
    """The best loss that all curves have; of no curves, the best. Raises UserError if there is none."""
    for name in LOSSES:
        if all(name in curve.series for curve in curves):
            return name
    without = next(curve.name for curve in curves if not set(LOSSES) & set(curve.series))
    raise UserError(f"{without} has no committed loss yet: train it further, or leave it out")


def log_binned(series: Series, after: int, bins: int = 32) -> Series:
    """Means over at most ``bins`` bins of equal width in log(step), of the points after step ``after``."""
    chosen = series.steps > after
    steps, values = series.steps[chosen].astype(float), series.values[chosen]
    if len(steps) <= bins:
        return Series(steps, values)
    edges = np.geomspace(steps[0], steps[-1] * (1 + 1e-9), bins + 1)
    bin_of = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    sums = [np.bincount(bin_of, weights, bins)[count > 0] for weights in (steps, values)]
    return Series(sums[0] / count[count > 0], sums[1] / count[count > 0])
