"""The high-resolution stage: what it takes over, what it trains, and what it may cost."""

from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch

from data_sharding.errors import UserError
from data_sharding.write.images import write_dataset
from fitv2_scale.checkpoint.weights import export_weights
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.load import load_config
from fitv2_scale.model.counts import logical_shapes, parameter_count
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.world import join
from fitv2_scale.planning.forecast.memory_per_rank import plan_state
from fitv2_scale.train.loop import train
from tests.support.commits import commit_bytes, read_tensors
from tests.support.pictures import write_pictures
from tests.support.ranks import run_ranks
from tests.support.run_history import losses
from tests.support.tiny_runs import CLASSES, make_tiny

TRAINED = ["x_embedder.*", "*.bias", "*adaLN_modulation*", "final_layer.*"]
STEPS = 60


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> str:
    """Pictures of up to 36 tokens, more than the first stage's 16, most of them wider than its 4."""
    root = tmp_path_factory.mktemp("large")
    write_pictures(root, 60, (48, 160), [f"class{i}" for i in range(CLASSES)], seed=1, steepest=1.0)
    url = str(tmp_path_factory.mktemp("data") / "large")
    write_dataset(str(root), url, max_tokens=36, workers=1, progress=False)
    return url


@pytest.fixture(scope="module")
def first(dataset, tmp_path_factory) -> str:
    config = make_tiny(dataset, tmp_path_factory.mktemp("first"), train__steps=8, checkpoint={"every_steps": 4})
    assert run_ranks(2, train, config) == [0, 0]
    return config.run


@pytest.fixture
def stage(first, large, tmp_path):
    """``stage("name", …)``: as configs/fitv2_3b2_hr.yaml, from the first run's EMA at step 4, one of its commits."""
    options = {
        "init_from": f"{first}@4",
        "model__rope": {"mode": "vision_ntk", "train_side": 4},
        "trainable": TRAINED,
        "layout__checkpointing": "full",
        "optimizer": {"lr": 2e-2, "warmup_steps": 0},
        "train__steps": STEPS,
        "checkpoint": {"every_steps": 20},
    }
    return lambda name, **changes: make_tiny(large, tmp_path, name, **(options | changes))


def is_trained(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in TRAINED)


def test_it_trains_what_it_names_from_what_was_there(stage, first):
    config = stage("stage")
    assert run_ranks(2, train, config) == [0, 0]
    before = read_tensors(first, "ema/", 4)
    for kind in ("param/", "ema/"):
        for name, tensor in read_tensors(config.run, kind).items():
            assert torch.equal(tensor, before[name]) == (not is_trained(name)), name
    assert read_tensors(config.run, "exp_avg/").keys() == {name for name in before if is_trained(name)}
    curve = losses(config.run)
    early, late = (np.mean([curve[step] for step in steps]) for steps in (range(1, 11), range(STEPS - 9, STEPS + 1)))
    assert late < 0.9 * early


@pytest.mark.parametrize("ranks, layout", [(1, {}), (3, {}), (2, {"tensor": 2}), (2, {"engine": "zero3"})])
def test_a_run_and_its_weights_file_begin_alike(stage, first, tmp_path, ranks, layout):
    """All tensors, those too that are trained, which the released loader drops."""
    file = str(tmp_path / "weights.safetensors")
    assert export_weights(first, file, ema=True, step=8) == 8
    expected = read_tensors(first, "ema/", 8)
    for name, source in (("run", f"{first}@8"), ("file", file)):
        still = {"lr": 1e-30, "warmup_steps": 0}
        options = {"train__steps": 1, "layout": {"precision": "fp32", **layout}, "optimizer": still}
        config = stage(name, init_from=source, **options)
        assert run_ranks(ranks, train, config) == [0] * ranks
        for kind in ("param/", "ema/"):
            found = read_tensors(config.run, kind)
            assert found.keys() == expected.keys()
            for key, tensor in found.items():  # the moving average of a number with itself may round
                torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-12)


def test_it_continues_where_it_stood(stage, first):
    """Also when what it began with is gone: its own commits have all of it."""
    whole, halves = stage("whole", train__steps=12), stage("halves", train__steps=5)
    assert run_ranks(2, train, whole) == [0, 0]
    assert run_ranks(2, train, halves) == [0, 0]
    assert run_ranks(2, train, stage("halves", train__steps=12)) == [0, 0]
    assert commit_bytes(halves.run) == commit_bytes(whole.run)
    assert losses(halves.run) == losses(whole.run)
    with pytest.raises(UserError, match="init_from: .*@4.* -> .*@8"):
        run_ranks(1, train, stage("halves", train__steps=13, init_from=f"{first}@8"))


def moments(config) -> int:
    with join() as world:
        engine = make_engine(config, Layout.of(world.size, 1), world)
        boxes = [b for name, t in engine.boxes().items() if name.startswith("exp_avg") for b in t.boxes]
        return sum(box.tensor.numel() * box.tensor.itemsize for box in boxes)


def test_memory_falls_as_planned(stage, first):
    config, layout = stage("stage"), Layout.of(1, 1)
    trained = parameter_count(config.model, config.trainable)
    assert run_ranks(1, moments, config) == [8 * trained]
    state, all_of_it = plan_state(config, layout), plan_state(stage("all", trainable=["*"]), layout)
    assert state.moments - 8 * trained == pytest.approx(0, abs=1024)  # AdamW's counts of steps
    assert all_of_it.moments - state.moments >= 8 * (parameter_count(config.model) - trained) - 1024
    assert state.gradients == 4 * trained


@pytest.mark.parametrize(
    "name, trained, share, cfg", [("fitv2_xl2_hr", 94_961_680, 14.151, 1.65), ("fitv2_3b2_hr", None, 13.99, 1.6)]
)
def test_published_shares(name, trained, share, cfg):
    config = load_config(f"configs/{name}.yaml")
    found = parameter_count(config.model, config.trainable)
    assert trained in (None, found)
    assert 100 * found / parameter_count(config.model) == pytest.approx(share, abs=0.005)
    base = load_config(f"configs/{name.removesuffix('_hr')}.yaml").model
    assert logical_shapes(config.model) == logical_shapes(base)
    assert (config.model.rope.mode, config.model.rope.train_side) == ("vision_ntk", 16)
    assert config.layout.checkpointing == "full" and config.sampling.cfg == cfg


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"init_from": "nowhere"}, "give RUN@STEP"),
        ({"init_from": "nowhere.safetensors"}, "there is no weights file nowhere.safetensors"),
        ({"init_from": "{first}@5"}, r"has no commit at step 5, but at \[4, 8\]"),
        ({"model__hidden": 64}, "holds another network: .* make the section model the same"),
    ],
)
def test_bad_beginnings(stage, first, changes, sentence):
    if "init_from" in changes:
        changes = {"init_from": changes["init_from"].format(first=first)}
    with pytest.raises(UserError, match=sentence):
        run_ranks(2, train, stage("bad", **changes))
