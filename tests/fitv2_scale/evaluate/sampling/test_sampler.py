"""Sampling: the same pictures on any number of ranks and in any pack, and a run that does not notice it."""

import io
import json
import os
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from data_sharding.errors import UserError
from fitv2_scale.checkpoint.weights import export_weights
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.model import ModelConfig, RopeConfig, parse_size
from fitv2_scale.config.schema import Config
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.config.solvers import solver_facts
from fitv2_scale.evaluate.sampling.image_grid import grid_requests
from fitv2_scale.evaluate.sampling.load_weights import open_weights
from fitv2_scale.evaluate.sampling.sampler import ImageRequest, rope_for_size, sample
from fitv2_scale.parallel.boxes import Box
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.failures import BrokenOff
from fitv2_scale.parallel.world import join
from fitv2_scale.run.run import Run
from fitv2_scale.train.loop import train
from tests.support.alone import Alone
from tests.support.commits import commit_bytes
from tests.support.ranks import run_ranks
from tests.support.thread_ranks import outcomes

# Eight of each; at a train_side of 4, seven of them are extrapolated, each by its own scales.
SIZES = ["64x64", "32x96", "80x32", "96x96", "16x112", "80x80", "128x48", "48x128"]
LABELS = [0, 1, 2, 3, 4, 0, 2, 4]
MODEL = ModelConfig(depth=1, hidden=8, heads=1, classes=5)
FLOW = {"model": MODEL, "objective": "flow"}


def open_on_two_nodes(weights: str, *config: str) -> list[tuple[int, int]]:
    """(copy, part of it) of the weights that each of four ranks holds; the node of a rank is made up."""
    rank = int(os.environ["RANK"])
    socket.gethostname = lambda: f"node{rank // 2}"
    with join() as world, open_weights(weights, world, *config) as opened:
        return world.all_gather((opened.engine.copy.replica, opened.engine.copy.shard))


def test_each_node_has_a_copy_of_the_weights(two_step_run, tmp_path):
    """So that no weights cross the network while sampling: of a run, and of a file whose config says otherwise."""
    each_node = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert run_ranks(4, open_on_two_nodes, two_step_run)[0] == each_node
    config = Run.open(two_step_run).config
    config["layout"]["replicate"] = 1
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    export_weights(two_step_run, str(tmp_path / "w.safetensors"), ema=True)
    files = [str(tmp_path / name) for name in ("w.safetensors", "config.yaml")]
    assert run_ranks(4, open_on_two_nodes, *files)[0] == each_node


def weigh(box: Box, scale: float) -> None:
    """Weights in which everything matters, alike in any layout (the initial ones give zero velocity)."""
    sizes = zip(box.offset, box.tensor.shape, strict=True)
    at = torch.meshgrid(*(torch.arange(o, o + n, dtype=torch.float64) for o, n in sizes), indexing="ij")
    box.tensor.copy_(scale * torch.sin(sum(a * prime for a, prime in zip(at, (12.9898, 78.233), strict=False))))


def draw(config: Config, order: int = 1, gather: bool = True, scale: float = 0.2, **sampling) -> dict[int, np.ndarray]:
    """The same 64 images."""
    with join() as world:
        layout = Layout.of(world.size, 1, config.layout.tensor)
        engine = make_engine(config, layout, world)
        for boxed in engine.boxes().values():
            for box in boxed.boxes:
                weigh(box, scale)
        requests = grid_requests(SIZES, LABELS, 16)[::order]
        with engine.ema_weights():
            made = sample(
                engine.network,
                requests,
                model=config.model,
                objective=solver_facts(sampling.get("solver", "euler")).objective,
                sampling=SamplingConfig(**{"steps": 4, "cfg": 2.0} | sampling),
                seed=3,
                world=world,
                tensor=layout.tensor,
                gather=gather,
            )
        return {request.index: (one.tokens, one.nfe) for request, one in made.items()}


def assert_same(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys() and len(expected) == 64
    for index, (tokens, _) in expected.items():
        np.testing.assert_allclose(found[index][0], tokens, rtol=tolerance, atol=tolerance)
    assert sum(found[index][1] != nfe for index, (_, nfe) in expected.items()) <= (tolerance > 1e-5)


@pytest.fixture
def extrapolating(tiny):
    return tiny(model__rope={"train_side": 4})


def test_the_same_images_on_any_number_of_processes(extrapolating):
    (alone,) = run_ranks(1, draw, extrapolating)
    assert alone[5][0].shape == (4, 4, 16) and alone[63][0].shape == (3, 8, 16)
    assert_same(run_ranks(1, draw, extrapolating, -1)[0], alone)  # another order in the pack
    assert_same(run_ranks(2, draw, extrapolating)[1], alone)
    shares = run_ranks(4, draw, extrapolating, 1, False)
    assert all(shares) and sum(len(share) for share in shares) == 64
    assert_same({index: one for share in shares for index, one in share.items()}, alone)


def test_the_same_images_with_tensor_parallelism(extrapolating, tiny):
    (alone,) = run_ranks(1, draw, extrapolating)
    split = tiny(model__rope={"train_side": 4}, layout__tensor=2)
    for found in run_ranks(2, draw, split):
        assert_same(found, alone)
    assert [len(share) for share in run_ranks(2, draw, split, 1, False)] == [64, 0]


def draw_dopri5(config: Config, order: int = 1) -> dict[int, np.ndarray]:
    return draw(config, order, solver="dopri5")


def test_adaptive_steps_are_each_images_own(extrapolating):
    """Ranks need the network differently often, and none waits for another. An error estimate is a small difference of
    large numbers, so that rounding moves steps a little, and results by a tenth of the tolerance at most."""
    (alone,) = run_ranks(1, draw_dopri5, extrapolating)
    assert len({nfe for _, nfe in alone.values()}) > 1
    assert_same(run_ranks(1, draw_dopri5, extrapolating, -1)[0], alone, 1e-4)
    assert_same(run_ranks(3, draw_dopri5, extrapolating)[2], alone, 1e-4)


def draw_ddpm(config: Config) -> dict[int, np.ndarray]:
    return draw(config, solver="ddpm", steps=3)


def test_ancestral_sampling_has_its_noise_on_any_number_of_processes(extrapolating):
    """Of each step, too: 64 images, each with noise of its own."""
    (alone,) = run_ranks(1, draw_ddpm, extrapolating)
    assert_same(run_ranks(3, draw_ddpm, extrapolating)[2], alone)
    assert len({float(tokens[0, 0, 0]) for tokens, _ in alone.values()}) == 64


def draw_two(config: Config) -> int:
    with join() as world:
        engine = make_engine(config, Layout.of(world.size, 1), world)
        made = sample(
            engine.network,
            grid_requests(["32x32"], [0, 1], 16),
            model=config.model,
            objective="flow",
            sampling=SamplingConfig(steps=2, solver="dopri5"),
            seed=3,
            world=world,
        )
        return len(made)


def test_more_ranks_than_pictures(tiny):
    assert run_ranks(4, draw_two, tiny()) == [2, 2, 2, 2]


def constant(x_TC, t_I, label_I, packing, rope):
    """v = label for a class and -1 without one, the last four channels twice that."""
    value_I = torch.where(label_I == 5, -torch.ones(()), label_I.float())
    return value_I[packing.image_T][:, None] * torch.tensor([1.0] * 12 + [2.0] * 4)


@pytest.mark.parametrize("channels", ["all", "three"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_guidance(cfg, channels):
    requests = grid_requests(["32x48", "16x16"], [0, 3], 16)

    def draw(velocity) -> dict[ImageRequest, np.ndarray]:
        options = SamplingConfig(cfg=cfg, steps=3, guided_channels=channels)
        made = sample(velocity, requests, sampling=options, **FLOW, seed=0, world=Alone())
        return {request: one.tokens for request, one in made.items()}

    moved, noise = draw(constant), draw(lambda x_TC, *rest: torch.zeros_like(x_TC))
    for request in requests:
        shift = moved[request] - noise[request]
        guided = -1 + cfg * (request.label + 1)
        last = 2 * (request.label if channels == "three" else guided)
        np.testing.assert_allclose(shift[..., :12], guided, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(shift[..., 12:], last, rtol=1e-5, atol=1e-5)
    assert 0.9 < np.concatenate([n.ravel() for n in noise.values()]).std() < 1.1


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_all_ranks_leave_what_is_broken_off_and_none_waits(solver):
    """Also one without pictures, which only keeps the others company: before their fourth call of the network."""
    calls = [0, 0]

    def act(world) -> None:
        world.device = torch.device("cpu")

        def network(*inputs):
            calls[world.rank] += 1
            return constant(*inputs)

        def between() -> None:
            if calls[world.rank] == 3:
                raise BrokenOff("SIGUSR1")

        options = SamplingConfig(cfg=1.0, solver=solver)
        sample(network, [ImageRequest(0, 1, 1, 1)], sampling=options, **FLOW, seed=0, world=world, between=between)

    assert [str(error) for error in outcomes(2, act)] == ["SIGUSR1"] * 2 and calls == [3, 3]


def test_a_class_that_the_model_has_not():
    with pytest.raises(UserError, match="class 5 is out of range: the model has classes 0 to 4"):
        sample(constant, [ImageRequest(0, 5, 1, 1)], sampling=SamplingConfig(), **FLOW, seed=0, world=Alone())


def test_positions_are_as_published_unless_asked_for():
    plain, scaled = RopeConfig(), RopeConfig(mode="vision_ntk", attention_scale="released")
    published = {"256x256": plain, "128x384": plain, "160x320": RopeConfig(mode="vision_ntk")}
    published |= {size: scaled for size in ("320x320", "224x448", "160x480")}
    for size, rope in published.items():
        assert rope_for_size(SamplingConfig(), MODEL, *parse_size(size, 16)) == rope
    fit = MODEL.model_copy(update={"mlp": "swiglu_4d", "qk_norm": "none", "adaln": "full"})
    of_fit = {"256x256": plain, "128x384": plain, "160x320": plain, "320x320": RopeConfig(mode="vision_ntk")}
    for size, rope in of_fit.items():
        assert rope_for_size(SamplingConfig(), fit, *parse_size(size, 16)) == rope
    stage = MODEL.model_copy(update={"rope": RopeConfig(mode="vision_ntk")})
    for size in ("512x512", "320x640", "256x768"):
        assert rope_for_size(SamplingConfig(), stage, *parse_size(size, 16)) == RopeConfig(mode="vision_ntk")
    asked = SamplingConfig(rope="yarn")
    assert rope_for_size(asked, MODEL, 20, 20) == RopeConfig(mode="yarn")
    asked = SamplingConfig(attention_scale="paper")
    assert rope_for_size(asked, MODEL, 20, 20) == RopeConfig(mode="vision_ntk", attention_scale="paper")


def test_sampling_leaves_the_run_as_it_was(tiny):
    plain = tiny("plain", train__steps=8)
    pictured = tiny("pictured", train__steps=8, sampling__every_steps=3, sampling__sizes=["32x48"], sampling__steps=2)
    assert run_ranks(2, train, plain) == run_ranks(2, train, pictured) == [0, 0]
    assert commit_bytes(plain.run) == commit_bytes(pictured.run)
    store = Run.open(pictured.run).store
    assert store.list("samples/") == ["samples/00000003.png", "samples/00000006.png", "samples/00000008.png"]
    assert Image.open(io.BytesIO(store.read("samples/00000003.png"))).size == (4 + 5 * (48 + 4), 4 + 32 + 4)
