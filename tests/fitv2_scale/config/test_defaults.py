"""Plain data that another version stored: a key that it lacks means its default, at any depth."""

import pytest
from pydantic import Field

from data_sharding.errors import UserError
from fitv2_scale.config.defaults import unknown_keys, with_defaults
from fitv2_scale.config.section import Section
from tests.support.newer_config import NewerConfig


class Inner(Section):
    width: int
    scale: float = 1.5


class Other(Section):
    depth: int
    bias: bool = True


class Outer(Section):
    name: str
    needed: Inner
    inner: Inner = Inner(width=3)
    maybe: Inner | None = None
    either: Inner | Other = Other(depth=1)
    listed: list[Inner] = []
    named: dict[str, Inner] = {}
    made: list[int] = Field(default_factory=lambda: [1, 2])


DEFAULTS = {
    "needed": {"scale": 1.5},
    "inner": {"width": 3, "scale": 1.5},
    "maybe": None,
    "either": {"depth": 1, "bias": True},
    "listed": [],
    "named": {},
    "made": [1, 2],
}


@pytest.mark.parametrize(
    "stored, filled",
    [
        ({}, DEFAULTS),  # ``name`` and ``needed.width`` have no default
        ({"name": "a", "made": []}, {"name": "a", **DEFAULTS, "made": []}),
        ({"inner": {"width": 7}}, {**DEFAULTS, "inner": {"width": 7, "scale": 1.5}}),
        ({"inner": {}}, {**DEFAULTS, "inner": {"scale": 1.5}}),
        ({"maybe": {"width": 7}}, {**DEFAULTS, "maybe": {"width": 7, "scale": 1.5}}),
        ({"either": {"depth": 2}}, {**DEFAULTS, "either": {"depth": 2, "bias": True}}),
        ({"either": {"width": 2}}, {**DEFAULTS, "either": {"width": 2, "scale": 1.5}}),
        ({"listed": [{"width": 1}]}, {**DEFAULTS, "listed": [{"width": 1, "scale": 1.5}]}),
        ({"named": {"a": {"width": 1}}}, {**DEFAULTS, "named": {"a": {"width": 1, "scale": 1.5}}}),
        ({"gone": 1}, {**DEFAULTS, "gone": 1}),
    ],
)
def test_absent_keys_get_their_defaults(stored, filled):
    assert with_defaults(Outer, stored) == filled


def test_unknown_keys_are_named():
    stored = {"name": "a", "gone": 1, "inner": {"width": 1, "old": {"x": 1}}, "maybe": {"width": 1, "former": 2}}
    assert unknown_keys(Outer, stored) == ["gone", "inner.old", "maybe.former"]


def test_a_recipe_is_completed_with_recipe_keys_alone():
    """Of a config with a key more in model, optimizer and data, an optional section, and an option moved to runtime."""
    stored = {
        "model": {"depth": 2, "hidden": 32, "heads": 2, "rope": {"train_side": 3}},
        "data": {"views": "crop", "cache_gib": 1.0},
        "optimizer": {"lr": 0.5},
    }
    recipe = NewerConfig.complete_recipe(stored)
    keys = ["model", "objective", "flow", "ddpm", "data", "optimizer", "ema", "trainable", "seed"]
    assert list(recipe) == [*keys, "init_from", "init_new"]
    assert (recipe["objective"], recipe["ddpm"]) == ("flow", {"label_dropout": 0.1})
    assert recipe["model"] == {
        "depth": 2,
        "hidden": 32,
        "heads": 2,
        "classes": 1000,
        "qk_norm": "layernorm",
        "adaln": "lora",
        "rope_theta": 10000.0,
        "rope": {"mode": "none", "attention_scale": "none", "train_side": 3},
        "patch": 2,
        "latent_channels": 4,
        "mlp": "swiglu",
        "position": "rope",
        "outputs": 1,
        "sincos": {"mode": "none", "train_side": 16},
        "registers": 0,
    }
    assert recipe["data"] == {"views": "crop", "mixup": None}
    assert recipe["optimizer"] == {
        "lr": 0.5,
        "warmup_steps": 5000,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "max_norm": 1.0,
        "schedule": {"name": "constant", "steps": 0},
    }
    assert (recipe["seed"], recipe["init_from"], recipe["trainable"]) == (0, "", ["*"])


def test_a_recipe_with_keys_that_are_gone_is_refused():
    with pytest.raises(UserError, match=r"model\.gone is no key of this version: continue the run with the version"):
        NewerConfig.complete_recipe({"model": {"gone": 1}})
    with pytest.raises(UserError, match=r"sam, optimizer\.sam are no keys of this version"):
        NewerConfig.complete_recipe({"sam": 1, "optimizer": {"sam": 1}})
