"""The files in configs/: each is read by every command that looks at one, and is the published network and recipe."""

import json
from pathlib import Path

import pytest

from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.load import load_config
from fitv2_scale.model.counts import parameter_count
from fitv2_scale.run.differences import flatten
from tests.support.repository import ROOT

DIT = {"s": 32_865_056, "b": 130_315_808, "l": 457_840_672, "xl": 674_834_720}  # DiT and SiT are one network
PARAMETERS = {
    **{f"{family}_{size}2": count for family in ("dit", "sit") for size, count in DIT.items()},
    "dit_xl2_512": DIT["xl"],
    "fit_b2": 158_664_224,
    "fit_xl2": 823_599_392,
    "fitv2_s2": 32_334_640,
    "fitv2_b2": 128_149_072,
    "fitv2_l2": 414_888_256,
    "fitv2_xl2": 671_045_776,
    "fitv2_xl2_hr": 671_045_776,
    "fitv2_3b2": 2_971_928_080,
    "fitv2_3b2_hr": 2_971_928_080,
    # FiT-B/2 without the second output: 16 rows of 768 and their biases.
    **{f"ablation_{row}": 158_664_224 - 16 * (768 + 1) for row in "abdef"},
    "ablation_c": 128_149_072,
    "demo": 2_405_368,
    "demo_hr": 2_405_368,
    "demo_fit": 2_392_352,
    "demo_sit": 2_443_392,
    "demo_dit": 2_443_392,
}
# Of DiT and SiT, by patch and size. train_side is that of 256 pixels.
PATCHES = {
    (4, 8): {"s": 32_920_448, "b": 130_426_496, "l": 457_988_224, "xl": 675_000_704},
    (8, 4): {"s": 33_142_016, "b": 130_869_248, "l": 458_578_432, "xl": 675_664_640},
}


def reported(capfd, *words: str):
    assert main([*words, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def shipped(name: str) -> str:
    return str(ROOT / "configs" / f"{name}.yaml")


def test_every_config_is_in_these_tests():
    assert {file.stem for file in (ROOT / "configs").glob("*.yaml")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_shown_and_planned(name, dataset, capfd):
    assert max(map(len, Path(shipped(name)).read_text().splitlines())) <= 120
    shown = reported(capfd, "config", "show", shipped(name))
    assert {"model.depth", "objective", "sampling.solver"} <= set(shown)
    plan = reported(capfd, "plan", shipped(name), f"data.url={dataset}", "batch.images=24")
    assert plan["model"]["parameters"] == PARAMETERS[name]


@pytest.mark.parametrize("family", ["dit", "sit"])
@pytest.mark.parametrize("patch,side", PATCHES)
@pytest.mark.parametrize("size", DIT)
def test_other_patches(family, patch, side, size):
    words = [f"model.patch={patch}", f"model.sincos.train_side={side}"]
    model = load_config(shipped(f"{family}_{size}2"), words).model
    assert parameter_count(model) == PATCHES[patch, side][size]
    assert model.sincos.train_side * model.pixels_per_token == 256


@pytest.mark.parametrize(
    "name,objective,times,views,warmup,clipped,solver",
    [
        *((f"dit_{size}2", "ddpm", None, "crop", 0, False, "ddpm") for size in DIT),
        *((f"sit_{size}2", "flow", "uniform", "crop", 0, False, "dopri5") for size in DIT),
        ("dit_xl2_512", "ddpm", None, "crop", 0, False, "ddpm"),
        ("fit_b2", "ddpm", None, "resize", 0, True, "ddpm"),
        ("fit_xl2", "ddpm", None, "resize", 0, True, "ddpm"),
        ("fitv2_b2", "flow", "logit_normal", "mixed", 5000, True, "euler"),
    ],
)
def test_published_recipes(name, objective, times, views, warmup, clipped, solver):
    config = load_config(shipped(name))
    optimizer = config.optimizer
    assert (config.objective, config.data.views, config.sampling.solver) == (objective, views, solver)
    assert times is None or config.flow.t_sampler == times
    assert getattr(config, objective).label_dropout == 0.1
    assert (optimizer.lr, optimizer.weight_decay, optimizer.warmup_steps) == (1e-4, 0, warmup)
    assert (optimizer.beta1, optimizer.beta2) == (0.9, 0.999) and optimizer.max_norm == (1 if clipped else 1e9)
    assert (config.batch.images, config.ema.decay, config.layout.precision) == (256, 0.9999, "bf16")
    assert solver != "ddpm" or (config.sampling.steps, config.sampling.cfg) == (250, 1.5)


# FiTv2's Tab. II: "Method, Scheduler, QK-Norm, Parameters, Data, Sampling". Two rows, and all keys of the recipe in
# which they differ: those of the columns in which the table's rows differ.
SCHEDULER = {"objective", "model.outputs", "flow.t_sampler"}  # a flow has one output, and times of a density
PARAMETERS_OF_V2 = {"model.depth", "model.mlp", "model.adaln"}
DIT_TO_FIT = {"model.mlp", "model.position", "data.views", "optimizer.max_norm"}
STEPS_OF_THE_TABLE = [
    ("dit_b2", "sit_b2", {"objective", "flow.t_sampler"}),  # SiT keeps the output of the variance
    ("dit_b2", "fit_b2", DIT_TO_FIT),
    ("fit_b2", "ablation_a", SCHEDULER | {"optimizer.warmup_steps"}),  # FiT-B's row is FiT's own run, without warm-up
    ("ablation_a", "ablation_b", {"model.qk_norm"}),
    ("ablation_b", "ablation_c", PARAMETERS_OF_V2),
    ("ablation_a", "ablation_d", {"data.views"}),
    ("ablation_d", "ablation_e", {"model.qk_norm"}),
    ("ablation_b", "ablation_e", {"data.views"}),
    ("ablation_e", "ablation_f", {"flow.t_sampler"}),
    ("ablation_f", "fitv2_b2", PARAMETERS_OF_V2),
    ("ablation_c", "fitv2_b2", {"data.views", "flow.t_sampler"}),
]


@pytest.mark.parametrize("first,second,keys", STEPS_OF_THE_TABLE)
def test_rows_of_the_ablation_differ_in_what_the_paper_names(first, second, keys):
    one, other = (flatten(load_config(shipped(name)).recipe()) for name in (first, second))
    assert {key for key in {*one, *other} if one.get(key) != other.get(key)} == keys


def test_the_ablation_ends_where_the_table_says():
    """Its columns, written down for each row: scheduler, QK-norm, depth, MLP, AdaLN, data, times."""
    original, reassigned = (12, "swiglu_4d", "full"), (15, "swiglu", "lora")
    for name, objective, qk_norm, parameters, views, times in (
        ("fit_b2", "ddpm", "none", original, "resize", None),
        ("ablation_a", "flow", "none", original, "resize", "uniform"),
        ("ablation_b", "flow", "layernorm", original, "resize", "uniform"),
        ("ablation_c", "flow", "layernorm", reassigned, "resize", "uniform"),
        ("ablation_d", "flow", "none", original, "mixed", "uniform"),
        ("ablation_e", "flow", "layernorm", original, "mixed", "uniform"),
        ("ablation_f", "flow", "layernorm", original, "mixed", "logit_normal"),
        ("fitv2_b2", "flow", "layernorm", reassigned, "mixed", "logit_normal"),
    ):
        config = load_config(shipped(name))
        model = config.model
        assert (config.objective, model.qk_norm, config.data.views) == (objective, qk_norm, views), name
        assert (model.depth, model.mlp, model.adaln) == parameters and model.position == "rope", name
        assert (model.hidden, model.heads, model.patch) == (768, 12, 2), name
        assert times is None or config.flow.t_sampler == times, name
