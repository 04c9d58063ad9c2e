"""Sampling: the same pictures on any number of ranks, and a run that does not notice being sampled from."""

import io

import numpy as np
import pytest
import torch
from conftest import CLASSES
from lineage import commit_bytes
from PIL import Image
from ranks import run_ranks

from data_sharding.errors import UserError
from fitv2_scale.engines import make_engine
from fitv2_scale.evaluate.from_run import sample_run
from fitv2_scale.evaluate.pictures import grid_png, grid_requests
from fitv2_scale.evaluate.sampler import sample
from fitv2_scale.model.config import parse_size
from fitv2_scale.parallel.mesh import Layout
from fitv2_scale.parallel.world import join
from fitv2_scale.run import Run
from fitv2_scale.train import train

SIZES = ["64x64", "32x96", "80x32"]


def draw(config, cfg: float, columns: int = 4) -> dict[int, np.ndarray]:
    """Samples from weights in which everything matters (the initial ones give zero velocity)."""
    with join() as world:
        engine = make_engine(config, Layout.of(world.size, 1), world)
        for boxed in engine.boxes().values():
            for box in boxed.boxes:
                box.tensor.add_(0.02)
        requests = grid_requests(SIZES, columns, CLASSES)
        with engine.ema_weights():
            return sample(engine.network, requests, classes=CLASSES, cfg=cfg, steps=6, seed=3, world=world)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_the_same_pictures_on_any_number_of_ranks(tiny, cfg):
    (alone,) = run_ranks(1, draw, tiny(), cfg)
    assert len(alone) == 12 and alone[5].shape == (2, 6, 16)
    for size in (2, 3):
        for found in run_ranks(size, draw, tiny(), cfg):
            for index, tokens in alone.items():
                np.testing.assert_allclose(found[index], tokens, rtol=1e-5, atol=1e-5)


def test_more_ranks_than_pictures(tiny):
    (alone,) = run_ranks(1, draw, tiny(), 2.0, 1)
    found = run_ranks(4, draw, tiny(), 2.0, 1)[3]
    for index, tokens in alone.items():
        np.testing.assert_allclose(found[index], tokens, rtol=1e-5, atol=1e-5)


class _Alone:
    """As much of a world as sampling needs."""

    rank, size, device = 0, 1, torch.device("cpu")

    def gather(self, value):
        return [value]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_euler_and_guidance_on_a_velocity_in_closed_form(cfg):
    """v = label + t for a class, 0 + t without one: after N steps x = x0 + cfg * label + (N - 1) / 2N."""
    requests, steps = grid_requests(["32x48", "16x16"], 3, 5), 8

    def velocity(x_TC, t_I, label_I, packing):
        value_I = torch.where(label_I == 5, torch.zeros(()), label_I.float()) + t_I
        return value_I[packing.image_T][:, None].expand(-1, 16)

    def still(x_TC, t_I, label_I, packing):
        return torch.zeros_like(x_TC)

    options = {"classes": 5, "cfg": cfg, "steps": steps, "seed": 0, "world": _Alone()}
    moved, noise = sample(velocity, requests, **options), sample(still, requests, **options)
    for request in requests:
        shift = moved[request.index] - noise[request.index]
        np.testing.assert_allclose(shift, cfg * request.label + (steps - 1) / (2 * steps), rtol=1e-5, atol=1e-5)
    assert 0.9 < np.concatenate([n.ravel() for n in noise.values()]).std() < 1.1


def test_sampling_leaves_the_run_as_it_was(tiny):
    plain = tiny("plain", train__steps=8)
    pictured = tiny("pictured", train__steps=8, sampling__every_steps=3, sampling__sizes=["32x48"], sampling__steps=2)
    assert run_ranks(2, train, plain) == run_ranks(2, train, pictured) == [0, 0]
    assert commit_bytes(plain.run) == commit_bytes(pictured.run)
    store = Run.open(pictured.run).store
    assert store.list("samples/") == ["samples/00000003.png", "samples/00000006.png", "samples/00000008.png"]
    assert Image.open(io.BytesIO(store.read("samples/00000003.png"))).size == (4 + 5 * (48 + 4), 4 + 32 + 4)


def test_pictures_from_a_run(tiny, tmp_path):
    config, out = tiny(train__steps=2), tmp_path / "out.png"
    assert run_ranks(2, train, config) == [0, 0]
    assert run_ranks(1, sample_run, config.run, str(out), ["48x32"], 3, 2.0, 4, 0) == [2]
    assert Image.open(out).size == (4 + 3 * (32 + 4), 4 + 48 + 4)


def test_grid_places_every_picture():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    pictures = [Image.new("RGB", size, c) for size, c in zip([(16, 8), (8, 8), (8, 16), (8, 8)], colours, strict=True)]
    grid = Image.open(io.BytesIO(grid_png(pictures, rows=2)))
    assert grid.size == (4 + 16 + 4 + 8 + 4, 4 + 8 + 4 + 16 + 4)
    assert [grid.getpixel(at) for at in ((6, 6), (26, 6), (10, 20), (26, 24))] == colours


@pytest.mark.parametrize("size", ["256", "100x100", "0x16", "16x-16", "axb", "16x16x16"])
def test_sizes_that_are_none(size):
    with pytest.raises(UserError, match="HEIGHTxWIDTH|at least 16"):
        parse_size(size)
