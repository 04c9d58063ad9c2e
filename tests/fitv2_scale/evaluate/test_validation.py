"""Validation: the same number on any layout, from a grid that never changes, in a run that does not notice it."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data_sharding import rng
from data_sharding.errors import UserError
from data_sharding.format.manifest import Manifest
from data_sharding.plan.pack_layout import PackShape, lay_out
from data_sharding.rng import Purpose
from data_sharding.stream.frames import read_frame
from data_sharding.write.images import write_dataset
from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.layout import Layout
from fitv2_scale.data import Data
from fitv2_scale.evaluate.validation import held_out, validation_grid
from fitv2_scale.model.init import fill_initial
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.model.to_torch import packing_to_torch
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.world import join
from fitv2_scale.run.run import Run
from fitv2_scale.tracking.journal import read
from fitv2_scale.train.in_loop_eval import validation_of
from fitv2_scale.train.loop import DONE, train
from tests.oracle.patches import latent_of, tokens_of
from tests.support.commits import commit_bytes
from tests.support.ranks import run_ranks
from tests.support.run_history import losses
from tests.support.tiny_runs import make_pictures

IMAGES, TIMES = 13, 3
SHIFT = 0.02  # on all weights: the initial ones give zero velocity


def measured(config) -> tuple[float, float, float]:
    """On each rank: the loss of raw weights, of EMA weights that are others, and of the raw ones again."""
    with join() as world:
        layout = Layout.of(world.size, config.layout.replicate, config.layout.tensor)
        data, engine = Data.open(config, layout.nodes(world.hosts)), make_engine(config, layout, world)
        for name, boxed in engine.boxes().items():
            for box in boxed.boxes:
                box.tensor.add_(SHIFT if name.startswith("param/") else 2 * SHIFT)
        engine.loaded()
        validation = validation_of(config, data, world, layout)
        raw = validation.loss(engine.network)
        with engine.ema_weights():
            ema = validation.loss(engine.network)
        return raw, ema, validation.loss(engine.network)


def noised_apart(objective: str, x1: Tensor, x0: Tensor, k: int) -> tuple[Tensor, Tensor, float]:
    """The network's input, its target and time at the k-th of the grid's times."""
    if objective == "flow":
        t = (k + 0.5) / TIMES
        return t * x1 + (1 - t) * x0, x1 - x0, t
    level = (833, 500, 166)[k]  # 1000 (1 - (k + 0.5) / 3), rounded down
    kept = float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: level + 1]))
    return kept**0.5 * x1 + (1 - kept) ** 0.5 * x0, x0, float(level)


def expected(config, shift: float) -> float:
    """One process, float64, an image and a time at a time, noise from the NumPy generator."""
    network = DiffusionTransformer(config.model)
    with torch.no_grad():
        for name, param in network.named_parameters():
            fill_initial(param, name, param.shape, (0,) * param.dim(), config.seed, config.model)
            param.add_(shift)
    network, found = network.double(), []
    manifest = Manifest.load(config.validation.url)
    samples = [s for f in range(len(manifest.frame_offset)) for s in read_frame(manifest, f)]
    order = np.argsort(rng.words64(0, Purpose.VALIDATION_ORDER, 0, [s.id for s in samples]), kind="stable")
    for sample in (samples[i] for i in order[:IMAGES]):
        tokens = tokens_of(latent_of(sample.views["resize"][0].astype(np.float64)), config.model.patch)
        x1, (rows, columns, _) = torch.from_numpy(tokens).flatten(0, 1), tokens.shape
        packing = packing_to_torch(lay_out([(rows, columns)], PackShape(rows * columns, 1, rows * columns)))
        for k in range(TIMES):
            u = (rng.words(0, Purpose.VALIDATION_NOISE, k, sample.id, np.arange(x1.numel())) + 0.5) * 2.0**-32
            radius, angle = np.sqrt(-2 * np.log(u[0::2])), 2 * np.pi * u[1::2]
            x0 = torch.from_numpy(np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1).reshape(x1.shape))
            x, target, t = noised_apart(config.objective, x1, x0, k)
            with torch.no_grad():
                output = network(x, torch.tensor([t]), torch.tensor([sample.label]), packing)
            found.append((output - target).square().mean().item())
    return float(np.mean(found))


def test_the_same_loss_with_larger_patches(tiny, dataset):
    changes = {"validation__url": dataset, "validation__images": IMAGES, "validation__timesteps": TIMES, "seed": 7}
    config = tiny(**changes, model__patch=4)
    raw, ema = (expected(config, shift) for shift in (SHIFT, 2 * SHIFT))
    for found in run_ranks(2, measured, config):
        assert found == pytest.approx((raw, ema, raw), rel=1e-6)


LAYOUTS = [(1, {}), (2, {}), (3, {"max_tokens": 64}), (2, {"tensor": 2}), (2, {"engine": "zero3"})]


def test_the_same_loss_on_any_layout(tiny, dataset):
    changes = {"validation__url": dataset, "validation__images": IMAGES, "validation__timesteps": TIMES, "seed": 7}
    raw, ema = (expected(tiny(**changes), shift) for shift in (SHIFT, 2 * SHIFT))
    assert abs(raw - ema) > 1e-3
    for size, layout in LAYOUTS:
        found = run_ranks(size, measured, tiny(**changes, **{f"layout__{k}": v for k, v in layout.items()}))
        for rank in found:
            assert rank == pytest.approx((raw, ema, raw), rel=1e-6), (size, layout)


def test_the_loss_of_a_ddpm(tiny, dataset):
    changes = {"validation__url": dataset, "validation__images": IMAGES, "validation__timesteps": TIMES}
    config = tiny(objective="ddpm", **changes)
    assert run_ranks(1, measured, config)[0][:2] == pytest.approx(
        [expected(config, shift) for shift in (SHIFT, 2 * SHIFT)], rel=1e-6
    )


def validations(run: str) -> dict[int, tuple[float, float]]:
    """val_loss and val_loss_ema by step."""
    records = (r for r in read(Run.open(run)) if r.metrics and "val_loss" in r.metrics)
    return {r.step: (r.metrics["val_loss"], r.metrics["val_loss_ema"]) for r in records}


WATCHED = {"validation__every_steps": 2, "validation__images": 20, "validation__timesteps": 2}
WATCHED |= {
    "sampling__every_steps": 3,
    "sampling__sizes": ["32x48"],
    "sampling__steps": 2,
    "checkpoint__every_steps": 4,
}


@pytest.mark.parametrize("engine,tensor", [("fsdp", 1), ("zero3", 1), ("fsdp", 2)])
def test_a_run_does_not_notice_that_it_is_looked_at(tiny, dataset, engine, tensor):
    changes = {"layout__engine": engine, "layout__tensor": tensor, "train__steps": 7}
    alone = tiny("alone", **changes, checkpoint__every_steps=4)
    watched = tiny("watched", **changes, **WATCHED, validation__url=dataset)
    assert run_ranks(2, train, alone) == run_ranks(2, train, watched) == [DONE] * 2
    assert commit_bytes(alone.run) == commit_bytes(watched.run)
    found = validations(watched.run)
    assert list(found) == [2, 4, 6, 7]
    assert all(raw != ema for raw, ema in found.values())
    assert not validations(alone.run)
    assert len(Run.open(watched.run).store.list("samples/")) == 3


def test_the_grid_is_the_same_at_every_step_and_after_a_resume(tiny, dataset):
    """With weights that stand still, so does the loss; another seed of the run's has the same grid."""
    changes = WATCHED | {"validation__url": dataset, "optimizer__lr": 1e-30, "sampling__every_steps": 0}
    assert run_ranks(2, train, tiny(**changes, train__steps=4)) == [DONE] * 2
    assert run_ranks(3, train, tiny(**changes, train__steps=8)) == [DONE] * 3
    found = validations(tiny().run)
    assert list(found) == [2, 4, 6, 8]
    first = found[2]
    assert found[4] == first and found[8] == found[6] == pytest.approx(first, rel=1e-6)
    manifests = [Manifest.load(dataset)]
    grid = validation_grid(manifests, tiny(**changes).validation)
    assert np.array_equal(grid.sample_id, validation_grid(manifests, tiny(**changes, seed=5).validation).sample_id)


@pytest.fixture(scope="module")
def apart(tmp_path_factory) -> str:
    """A dataset that has images set aside."""
    root, url = tmp_path_factory.mktemp("pictures"), str(tmp_path_factory.mktemp("apart") / "set")
    make_pictures(root, 60)
    write_dataset(str(root), url, max_tokens=16, workers=1, holdout=0.2, progress=False)
    return url


def test_what_was_set_aside_is_what_is_looked_at(tiny, apart):
    config = tiny(data__url=apart, train__steps=2, validation__every_steps=1)
    grid = validation_grid(held_out([Manifest.load(apart)], config.validation), config.validation)
    assert set(grid.sample_id) == set(Manifest.load(f"{apart}/holdout").sample_id)
    assert not set(grid.sample_id) & set(Manifest.load(apart).sample_id)
    assert len(grid.sample_id) == 12 * 8 and set(zip(grid.epoch.tolist(), grid.sample_id.tolist(), strict=True)) == {
        (k, i) for k in range(8) for i in grid.sample_id.tolist()
    }
    assert run_ranks(2, train, config) == [DONE] * 2
    found = validations(config.run)
    assert list(found) == [1, 2] and len(losses(config.run)) == 2
    said, also = run_ranks(2, validated, config.run), run_ranks(1, validated, f"{config.run}@2")
    assert said[0]["step"] == also[0]["step"] == 2 and said[0]["images"] == 12
    assert said[0]["val_loss_ema"] == pytest.approx(found[2][1], rel=1e-6)
    assert also[0]["val_loss_ema"] == pytest.approx(found[2][1], rel=1e-6)


def validated(weights: str) -> dict | None:
    """What `fitv2 validate --json` prints, on the first rank."""
    with redirect_stdout(io.StringIO()) as out:
        assert main(["validate", weights, "--json"]) == 0
    return json.loads(out.getvalue()) if out.getvalue() else None


def test_what_cannot_be_looked_at_is_refused_at_once(tiny, dataset, apart, tmp_path):
    with pytest.raises(UserError, match=r"has no images set aside for validation: write it with `--holdout 0\.02`"):
        run_ranks(2, train, tiny(validation__every_steps=2))
    assert not Path(tiny().run, "samples").exists()
    with pytest.raises(UserError, match=r"no dataset at .*nowhere"):
        run_ranks(1, train, tiny("b", validation__every_steps=2, validation__url=str(tmp_path / "nowhere")))
    make_pictures(tmp_path / "large", 20)
    write_dataset(str(tmp_path / "large"), str(tmp_path / "set"), max_tokens=36, workers=1, progress=False)
    with pytest.raises(UserError, match="images of 3. tokens, but packs of this run only hold images of up to 16"):
        run_ranks(2, train, tiny("c", validation__every_steps=2, validation__url=str(tmp_path / "set")))
    make_pictures(tmp_path / "small", 20, (16, 40))
    write_dataset(str(tmp_path / "small"), str(tmp_path / "little"), max_tokens=16, workers=1, progress=False)
    small = sum(min(size) < 2 for size in Manifest.load(str(tmp_path / "little")).size[:, 0].tolist())
    sentence = rf"^{small} of the 20 images that validation takes of .* than one patch of model\.patch=4 on a side: set"
    with pytest.raises(UserError, match=sentence):
        changes = {"validation__every_steps": 2, "validation__url": str(tmp_path / "little"), "model__patch": 4}
        run_ranks(2, train, tiny("e", **changes))
    shard = next(Path(apart, "holdout").glob("shard-*"))
    bytes_ = shard.read_bytes()
    try:
        shard.unlink()
        with pytest.raises(UserError, match="the shard is missing"):
            run_ranks(3, train, tiny("d", data__url=apart, validation__every_steps=2))
    finally:
        shard.write_bytes(bytes_)
