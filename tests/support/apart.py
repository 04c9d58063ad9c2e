"""Runs compared with a training that was written apart: see tests/oracle."""

import json
from functools import cache

import pytest

from fitv2_scale.config.load import parse_config
from fitv2_scale.config.schema import Config
from tests.oracle.training import Noised, Recipe, Trained, trained_apart
from tests.support.commits import read_tensors
from tests.support.planned_images import planned_images
from tests.support.run_history import losses, metrics, trained

# fp32 against float64: losses were off by 2e-7 at most, weights by 3e-7, the scales of logits (near 4) by 1.3e-6.
LOSSES, NORMS, WEIGHTS = 1e-6, 1e-5, 3e-6


def records_apart(config: Config, recipe: Recipe, steps: range) -> dict[int, list[tuple]]:
    """What the audits of ``steps`` (counted from 0) should say, as ``trained`` returns it."""
    images = planned_images(config)
    return {step: sorted(Noised.of(image, recipe).record(image) for image in images(step)) for step in steps}


def losses_apart(config: Config, recipe: Recipe, steps: int) -> Trained:
    """Of the images that ``config`` plans; made once for all that train on the same ones."""
    data = config.model_dump(mode="json", include={"data", "batch", "seed", "model"})
    return _trained_once(json.dumps(data), recipe, steps)


@cache
def _trained_once(data: str, recipe: Recipe, steps: int) -> Trained:
    config = parse_config(json.loads(data) | {"run": "nowhere", "train": {"steps": steps}}, "test")
    return trained_apart(recipe, planned_images(config), steps)


def assert_trained_as_apart(config: Config, recipe: Recipe) -> None:
    """Ids, times, labels and inputs to the bit, losses, norms, final weights and EMA to the rounding of fp32."""
    steps = config.train.steps
    assert trained(config.run) == records_apart(config, recipe, range(steps))
    expected = losses_apart(config, recipe, steps)
    assert losses(config.run) == pytest.approx(expected.losses, rel=LOSSES)
    norms = {step: found["grad_norm"] for step, found in metrics(config.run).items() if "grad_norm" in found}
    assert norms == pytest.approx(expected.norms, rel=NORMS)
    for kind, weights in (("param/", expected.weights), ("ema/", expected.ema)):
        found = read_tensors(config.run, kind)
        assert found.keys() == weights.keys()
        off = {name: (found[name].double() - weight).abs().max().item() for name, weight in weights.items()}
        worst = max(off, key=lambda name: off[name])
        assert off[worst] <= WEIGHTS, f"{kind}{worst} is off by {off[worst]}"
