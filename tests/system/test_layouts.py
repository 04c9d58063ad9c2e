"""A run is a function of (recipe, dataset): every layout trains on the same images, times, labels and noise, and to the
same losses and weights, as a training in float64 that was written apart (tests/oracle)."""

import pytest

from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from fitv2_scale.train.loop import train
from tests.oracle.network import Form
from tests.oracle.training import Recipe
from tests.support.apart import assert_trained_as_apart, losses_apart
from tests.support.layout_grid import FASTER
from tests.support.ranks import run_ranks
from tests.support.run_history import losses, metrics, trained

SEED, STEPS = 7, 12
RECIPE = Recipe(SEED)


def run(config: Config, ranks: int) -> Config:
    assert run_ranks(ranks, train, config) == [0] * ranks
    return config


@pytest.mark.parametrize(
    "ranks,layout",
    [
        (1, {}),
        (2, {}),
        (3, {"layout__max_tokens": 64}),
        (4, {"layout__replicate": 2}),
        (2, {"layout__pad_to_multiple_of": 128, "layout__reshard_after_forward": "never"}),
        (1, FASTER),
        (4, FASTER | {"layout__replicate": 2, "layout__checkpointing": "selective"}),
        (4, FASTER | {"layout__tensor": 2}),
        (2, {"layout__tensor": 2}),
        (2, {"layout__engine": "zero3", "layout__max_tokens": 64}),
        (4, {"layout__engine": "zero3", "layout__tensor": 2}),
    ],
    ids=lambda value: "-".join(f"{k.split('__')[1]}{v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_every_layout_is_the_training_written_apart(tiny, ranks, layout):
    """One rank and several, two copies, tensor groups, DeepSpeed, one pack and several."""
    assert_trained_as_apart(run(tiny(seed=SEED, train__steps=STEPS, **layout), ranks), RECIPE)


def test_longer_than_the_warm_up_and_over_an_epoch(tiny):
    """25 steps, of which the warm-up is 4 and an epoch 20, with weight decay and betas other than the defaults."""
    changes = {"warmup_steps": 4, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.05, "max_norm": 0.3, "eps": 1e-6}
    config = tiny(seed=SEED, train__steps=25, **{f"optimizer__{key}": value for key, value in changes.items()})
    recipe = Recipe(SEED, warmup=4, beta1=0.8, beta2=0.95, weight_decay=0.05, max_norm=0.3, eps=1e-6)
    assert_trained_as_apart(run(config, 2), recipe)
    assert {epoch for images in trained(config.run).values() for epoch, *_ in images} == {0, 1}


@pytest.mark.parametrize("model", [{"qk_norm": "l2_scale"}, {"qk_norm": "none"}, {"adaln": "full"}])
def test_the_cookbook_is_the_training_written_apart(tiny, model):
    changes = {f"model__{key}": value for key, value in model.items()}
    changes |= {"flow__t_sampler": "uniform", "data__views": "crop", "flow__label_dropout": 0.4}
    recipe = Recipe(SEED, Form(**model), sampler="uniform", dropout=0.4)
    assert_trained_as_apart(run(tiny(seed=SEED, train__steps=8, **changes), 2), recipe)


@pytest.mark.parametrize("ranks,layout", [(1, {}), (2, {"layout__max_tokens": 64}), (2, {"layout__engine": "zero3"})])
def test_a_ddpm_is_the_training_written_apart(tiny, ranks, layout):
    """Of fixed variance; tests/fitv2_scale/model/test_ddpm.py has the other. What the section flow says is not used."""
    changes = {"objective": "ddpm", "ddpm__label_dropout": 0.4, "flow__label_dropout": 1.0, **layout}
    recipe = Recipe(SEED, objective="ddpm", dropout=0.4)
    assert_trained_as_apart(run(tiny(seed=SEED, train__steps=8, **changes), ranks), recipe)


DIT = {"qk_norm": "none", "adaln": "full", "mlp": "gelu", "position": "sincos", "outputs": 2}
FIT = {"qk_norm": "none", "adaln": "full", "mlp": "swiglu_4d", "outputs": 2}


@pytest.mark.parametrize(
    "ranks,layout",
    [
        (1, {}),
        (3, {"layout__max_tokens": 64}),
        (4, {"layout__tensor": 2}),
        (4, {"layout__replicate": 2, "layout__kernels": "triton", "layout__checkpointing": "selective"}),
        (2, {"layout__engine": "zero3", "layout__tensor": 2}),
    ],
)
@pytest.mark.parametrize(
    "form,objective,views",
    [(DIT, "ddpm", "crop"), (FIT, "ddpm", "resize"), (DIT, "flow", "crop")],
    ids=["DiT", "FiT", "SiT"],
)
def test_each_family_is_the_training_written_apart(tiny, form, objective, views, ranks, layout):
    """DDPM with the variance that it learns. Of eps: see tests/fitv2_scale/parallel/test_families.py."""
    changes = {f"model__{key}": value for key, value in form.items()} | layout
    changes |= {"objective": objective, "flow__t_sampler": "uniform", "data__views": views, "optimizer__eps": 1e-4}
    recipe = Recipe(SEED, Form(**form), sampler="uniform", objective=objective, eps=1e-4)
    assert_trained_as_apart(run(tiny(seed=SEED, train__steps=8, **changes), ranks), recipe)


@pytest.mark.parametrize("ranks,layout", [(1, {}), (2, {}), (2, {"layout__tensor": 2})], ids=str)
def test_larger_patches_are_the_training_written_apart(tiny, ranks, layout):
    """Groups of 2 x 2 stored tokens, of images whose sides are even and odd: those that patches of 2 are trained on."""
    config = tiny(seed=SEED, train__steps=STEPS, model__patch=4, **layout)
    assert_trained_as_apart(run(config, ranks), Recipe(SEED, Form(channels=64)))
    plan, tokens = Data.open(tiny(seed=SEED), (1,)).plan, 0
    for step, images in trained(config.run).items():
        planned = plan.step(step)
        ids = zip(planned.epoch.tolist(), planned.sample_id.tolist(), strict=True)
        assert sorted((epoch, number) for epoch, number, *_ in images) == sorted(ids)
        sizes = plan.manifests[0].size[planned.row, planned.view].tolist()
        tokens += sum((rows // 2) * (columns // 2) for rows, columns in sizes)
    assert metrics(config.run)[STEPS]["tokens"] == tokens


def test_bf16_stays_near_fp32(tiny):
    """bf16 keeps 8 bits: a relative error of 2**-9 an operation, averaging out over tokens and images."""
    half = run(tiny(seed=SEED, train__steps=STEPS, layout__precision="bf16"), 2)
    expected = losses_apart(half, RECIPE, STEPS)
    assert losses(half.run) == pytest.approx(expected.losses, rel=1e-2)
    assert losses(half.run) != pytest.approx(expected.losses, rel=1e-6)


@pytest.mark.parametrize("changes", [{}, FASTER], ids=["as it is", "faster"])
def test_compiled_blocks_are_the_same_run(tiny, changes):
    config = tiny(seed=SEED, model__depth=1, train__steps=5, layout__compile=True, **changes)
    assert_trained_as_apart(run(config, 1), Recipe(SEED, Form(depth=1)))


def test_the_learning_rate_is_reported_as_it_was(tiny):
    """Of steps 1 to 6 of a warm-up of 4."""
    config = run(tiny(train__steps=6, optimizer__warmup_steps=4, optimizer__lr=8e-4), 1)
    rates = {step: found["lr"] for step, found in metrics(config.run).items() if "lr" in found}
    assert rates == pytest.approx({1: 2e-4, 2: 4e-4, 3: 6e-4, 4: 8e-4, 5: 8e-4, 6: 8e-4})
