"""Predictions of losses that have not been measured yet: made, kept, and scored once they have been.

They are kept as lines of predictions.jsonl:

    {"made": "2025-06-01T12:00:00+00:00", "of": "fitv2_3b2@2000000", "model": {"depth": 40, …}, "step": 2000000,
     "images": 512000000.0, "metric": "val_loss_ema", "value": 0.512, "low": 0.509, "high": 0.514, "level": 0.9,
     "by": "sizes", "runs": ["b2-0a1b…", "xl2-…"], "meaning": {"datasets": "5c84…", "data.views": "mixed", …}}

``low`` and ``high`` are null where there is no interval. ``meaning`` is that of the runs' losses (see ``meaning``);
predictions of earlier versions have none.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from data_sharding.errors import UserError
from data_sharding.storage.failures import as_sentence
from data_sharding.storage.json_bytes import parse_json
from data_sharding.storage.records import Count, Number, Shape
from fitv2_scale.config.load import load_config
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.config.schema import Config
from fitv2_scale.model.counts import parameter_count
from fitv2_scale.planning.scaling.bootstrap import LEVEL, interval
from fitv2_scale.planning.scaling.laws import RunLaw, SurfaceLaw
from fitv2_scale.planning.scaling.meaning import OF_A_CONFIG, Origin, meaning_of, unlike
from fitv2_scale.planning.scaling.read_curves import Curve
from fitv2_scale.run.log import now
from fitv2_scale.run.reference import split_reference

PREDICTIONS = "predictions.jsonl"
_OBJECTIVE_OF_BEFORE = {"objective": "flow"}  # of a prediction that says none: there was no other
_SCORED_AROUND = 0.02  # a prediction for step s is scored by the mean over s ± this fraction of it


def _model(record: dict[str, Any]) -> dict[str, Any]:
    ModelConfig.model_validate(record)
    return record


class _Prediction(Shape):
    """A line."""

    made: str
    of: str
    model: Annotated[dict[str, Any], AfterValidator(_model)]
    step: Count
    images: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    metric: str
    value: Number
    low: Number | None
    high: Number | None
    level: Number
    meaning: dict[str, str] = {}

    @model_validator(mode="after")
    def _interval(self):
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high are both numbers or both null")
        return self


@dataclass(frozen=True)
class PredictionRequest:
    """CONFIG@STEP: asks for the loss of a config's network at a step."""

    text: str
    config: Config
    step: int

    @classmethod
    def parse(cls, text: str) -> "PredictionRequest":
        """Raises UserError. The config is a file, or the name of one in configs/."""
        name, step = split_reference(text)
        if not step:
            raise UserError(f"--predict '{text}': give CONFIG@STEP, as in fitv2_3b2@2000000")
        path = name if Path(name).exists() else f"configs/{name}.yaml"
        return cls(f"{Path(name).stem}@{step}", load_config(path), step)


def predict(
    request: PredictionRequest, metric: str, surface: SurfaceLaw | None, laws: Sequence[tuple[Curve, RunLaw]]
) -> dict[str, Any]:
    """The prediction by the law over sizes if there is one, else by the law of the longest run of the same network.
    Raises UserError if there is neither."""
    model, step = request.config.model, request.step
    images = float(step * request.config.batch.images)
    if surface is not None:
        n = parameter_count(model)
        value, refits = float(surface.fit(n, images)), [float(f(n, images)) for f in surface.refits]
        by, runs, meaning = "sizes", [curve.name for curve, _ in laws], laws[0][0].meaning
    else:
        own = [(c, law.fit, law.refits) for c, law in laws if c.model == model and law.fit is not None]
        if not own:
            raise UserError(
                f"{request.text} cannot be predicted: there are no three sizes for a law over sizes, and no run of "
                "this network is long enough for a law of its own"
            )
        curve, fit, refits = max(own, key=lambda found: found[0].last)
        at = images / curve.batch
        value, refits = float(fit(at)), [float(f(at)) for f in refits]
        by, runs, meaning = "run", [curve.name], curve.meaning
    own_meaning = {k: v for k, v in meaning_of(request.config.model_dump(), Origin()).items() if k in OF_A_CONFIG}
    if differences := unlike(meaning, own_meaning, metric):
        raise UserError(
            f"{request.text} cannot be predicted: the runs and its config differ ({'; '.join(differences)})"
        )
    low, high = interval(refits) if refits else (None, None)
    return {
        "made": now(),
        "of": request.text,
        "model": model.model_dump(mode="json"),
        "step": step,
        "images": images,
        "metric": metric,
        "value": value,
        "low": low,
        "high": high,
        "level": LEVEL,
        "by": by,
        "runs": runs,
        "meaning": dict(meaning),
    }


class PredictionFile:
    """The predictions in a folder."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / PREDICTIONS

    def add(self, prediction: dict[str, Any]) -> None:
        with as_sentence(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a") as file:
                file.write(json.dumps(prediction) + "\n")

    def all(self) -> list[dict[str, Any]]:
        """All predictions, oldest first. Raises UserError if a line is not one."""
        if not self._file.exists():
            return []
        try:
            return [_Prediction.check(parse_json(line)) for line in self._file.read_bytes().splitlines()]
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self._file} has a line that is not a prediction ({error}): remove it") from error


def score(prediction: dict[str, Any], curves: Sequence[Curve]) -> dict[str, Any]:
    """The prediction with ``measured``, ``error`` (relative to ``measured``, None if that is 0) and ``inside`` (its
    interval); all None until a run of that network, whose loss means the same, has reached the step. For several such
    runs, ``measured`` is their mean."""
    model, images, found = ModelConfig.model_validate(prediction["model"]), prediction["images"], []
    for curve in curves:
        series = curve.series.get(prediction["metric"])
        if unlike(_OBJECTIVE_OF_BEFORE | prediction.get("meaning", {}), curve.meaning, prediction["metric"]):
            continue
        if curve.model == model and series is not None:
            at = curve.along("images", series.steps)
            near = np.abs(at / images - 1) <= _SCORED_AROUND
            if at[-1] >= images and near.any():
                found.append(float(series.values[near].mean()))
    if not found:
        return prediction | {"measured": None, "error": None, "inside": None}
    measured, low, high = float(np.mean(found)), prediction["low"], prediction["high"]
    inside = None if low is None else low <= measured <= high
    error = prediction["value"] / measured - 1 if measured else None
    return prediction | {"measured": measured, "error": error, "inside": inside}
