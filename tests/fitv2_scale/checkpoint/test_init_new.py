"""Tensors that are drawn instead of taken from init_from: for other classes, and for what the weights lack."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_sharding.errors import UserError
from data_sharding.write.images import write_dataset
from fitv2_scale.checkpoint.init_from import load_initial_weights
from fitv2_scale.config.layout import Layout
from fitv2_scale.data import Data
from fitv2_scale.evaluate.sampling import load_weights
from fitv2_scale.identity import check_start
from fitv2_scale.model.counts import new_names
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.world import join
from fitv2_scale.run.run import Run
from fitv2_scale.run.weights_source import WeightsSource
from fitv2_scale.train.loop import train
from fitv2_scale.train.setup import claim, open_session
from tests.support.commits import read_tensors
from tests.support.other_weights import weights_of
from tests.support.public_weights import MODEL, dit_weights
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import make_pictures

TABLE = "y_embedder.embedding_table.weight"
FEWER = {"depth": 2, "hidden": 32, "heads": 2, "classes": 2}


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> str:
    """A dataset of two classes."""
    root = tmp_path_factory.mktemp("others")
    make_pictures(root, 60)
    for number in range(3):
        shutil.rmtree(root / f"class{number}")
    url = str(tmp_path_factory.mktemp("data") / "others")
    write_dataset(str(root), url, max_tokens=16, workers=1, progress=False)
    return url


def state(config) -> dict[str, torch.Tensor]:
    """Weights and EMA with which a run of ``config`` begins."""
    with join() as world:
        engine = make_engine(config, Layout.of(world.size, 1), world)
        if config.init_from:
            new = new_names(config.model, config.init_new)
            load_initial_weights(WeightsSource.parse(config.init_from), engine, config.model, world, new)
        kinds = ("param/", "ema/")
        return {n: t.boxes[0].tensor.clone() for n, t in engine.boxes().items() if n.startswith(kinds)}


@pytest.mark.parametrize("source", ["run", "file"])
def test_another_table_of_classes_is_drawn_and_the_rest_is_kept(tiny, two_step_run, tmp_path, source):
    """As a run without init_from draws it; with fewer rows, or with as many."""
    file, _ = weights_of(two_step_run, tmp_path / "weights")
    given, kept = f"{two_step_run}@2" if source == "run" else file, load_file(file)
    for model in (FEWER, FEWER | {"classes": 5}):
        drawn = state(tiny(model=model, seed=4))
        found = state(tiny(model=model, seed=4, init_from=given, init_new=[TABLE]))
        assert found.keys() == drawn.keys() and len(found) == 2 * len(kept)
        for key, tensor in found.items():
            name = key.partition("/")[2]
            assert torch.equal(tensor, drawn[key] if name == TABLE else kept[name]), key


def notes_of(config) -> list[str]:
    """What the user is told of the first attempt."""
    with join() as world:
        data = Data.open(config, (1,))
        attempt = claim(config, data.plan, None, world)
        return open_session(config, world, Layout.of(world.size, 1), data, attempt, None).notes


def test_training_on_other_classes(tiny, two_step_run, others):
    config = tiny(
        model=FEWER, data__url=others, train__steps=2, init_from=f"{two_step_run}@2", init_new=["y_embedder.*"]
    )
    assert run_ranks(1, notes_of, config) == [[f"starts with the weights of {two_step_run}@2; new tensors: {TABLE}"]]
    assert run_ranks(2, train, config) == [0, 0]
    start = json.loads((Path(config.run) / "attempts/2/start.json").read_text())
    assert start["init_new"] == [TABLE]
    assert read_tensors(config.run, "ema/")[TABLE].shape == (3, 32)
    assert Run.open(config.run).recipe["init_new"] == ["y_embedder.*"]
    with pytest.raises(UserError, match=r'init_new: \["y_embedder.\*"\] -> \["\*"\]'):
        run_ranks(1, train, config.model_copy(update={"init_new": ["*"]}))


def test_without_the_key_it_is_named(tiny, two_step_run, others, tmp_path):
    file, _ = weights_of(two_step_run, tmp_path / "weights")
    said = r"table.weight is \(6, 32\) there and \(3, 32\) in this config: .*or let init_new name the tensors"
    with pytest.raises(UserError, match=said):
        state(tiny(model=FEWER, init_from=f"{two_step_run}@2"))
    with pytest.raises(UserError, match=r"\(model.classes is 5, not 2\).*; in training, init_new names tensors"):
        state(tiny(model=FEWER, init_from=file))
    config = tiny(model=FEWER, data__url=others, init_from=f"{two_step_run}@2")
    plan = Data.open(config, (1,)).plan
    with pytest.raises(UserError, match=rf"learned other classes .*init_new='\[\"{TABLE}\"\]', which draws"):
        check_start(config, plan, None)
    with pytest.raises(UserError, match="learned other classes"):  # another tensor that is new changes nothing there
        check_start(config.model_copy(update={"init_new": ["final_layer.*"]}), plan, None)
    check_start(config.model_copy(update={"init_new": [TABLE]}), plan, None)


def test_tensors_that_the_weights_lack(tiny, two_step_run, tmp_path):
    """Named, they are drawn; those that the network lacks are refused in any case."""
    file, _ = weights_of(two_step_run, tmp_path / "weights")
    model = FEWER | {"classes": 5, "qk_norm": "l2_scale"}
    for given in (f"{two_step_run}@2", file):
        found = state(tiny(model=model, init_from=given, init_new=["blocks.*.qk_scale"]))
        assert found["ema/blocks.1.attn.qk_scale"].tolist() == [4.0, 4.0]  # the root of a head's 16 channels
        with pytest.raises(UserError, match="qk_scale"):
            state(tiny(model=model, init_from=given))
    more = tmp_path / "more.safetensors"
    save_file(load_file(file) | {"blocks.0.attn.qk_scale": torch.ones(2)}, more)
    with pytest.raises(UserError, match=r"1 are left over \(blocks.0.attn.qk_scale\)"):
        state(tiny(init_from=str(more), init_new=["blocks.*"]))


def test_a_key_that_names_nothing_is_refused(tiny):
    with pytest.raises(UserError, match="init_new is for init_from, and without it all tensors are drawn: leave it"):
        tiny(init_new=[TABLE])
    with pytest.raises(UserError, match=f"no tensor's name matches y_embed; that of the classes is {TABLE}"):
        run_ranks(1, train, tiny(init_from="runs/first@2", init_new=[TABLE, "y_embed"]))


def test_public_weights_of_sit_are_opened_to_sample_from(tiny, tmp_path):
    """A training file in its own layout, with a config beside it."""
    weights, file = dit_weights(), tmp_path / "sit.pt"
    torch.save({"model": dit_weights(1), "ema": weights, "args": object}, file)
    (tmp_path / "sit.yaml").write_text(json.dumps(tiny(model=MODEL).model_dump(mode="json")))
    with join() as world, load_weights.open_weights(str(file), world, str(tmp_path / "sit.yaml")) as opened:
        held = {n: t.boxes[0].tensor for n, t in opened.engine.boxes().items()}
    assert torch.equal(held[f"ema/{TABLE}"], weights[TABLE])
    assert torch.equal(held["ema/x_embedder.proj.weight"], weights["x_embedder.proj.weight"].flatten(1))
