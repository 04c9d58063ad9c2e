"""Sampling: the same pictures on any number of ranks and in any pack, and a run that does not notice it."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from data_sharding.errors import UserError
from fitv2_scale.cli.__main__ import main
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.model import ModelConfig, RopeConfig, parse_size
from fitv2_scale.config.schema import Config
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.evaluate.sampling.image_grid import grid_png, grid_requests
from fitv2_scale.evaluate.sampling.sampler import Request, rope_of, sample
from fitv2_scale.parallel.boxes import Box
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.world import join
from fitv2_scale.run.run import Run
from fitv2_scale.train.loop import train
from tests.support.commits import commit_bytes
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import make_tiny

# Eight of each; at a train_side of 4, seven of them are extrapolated, each by its own scales.
SIZES = ["64x64", "32x96", "80x32", "96x96", "16x112", "80x80", "128x48", "48x128"]
LABELS = [0, 1, 2, 3, 4, 0, 2, 4]
MODEL = ModelConfig(depth=1, hidden=8, heads=1, classes=5)


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
        requests = grid_requests(SIZES, LABELS)[::order]
        with engine.ema_weights():
            made = sample(
                engine.network,
                requests,
                model=config.model,
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


def draw_two(config: Config) -> int:
    with join() as world:
        engine = make_engine(config, Layout.of(world.size, 1), world)
        made = sample(
            engine.network,
            grid_requests(["32x32"], [0, 1]),
            model=config.model,
            sampling=SamplingConfig(steps=2, solver="dopri5"),
            seed=3,
            world=world,
        )
        return len(made)


def test_more_ranks_than_pictures(tiny):
    assert run_ranks(4, draw_two, tiny()) == [2, 2, 2, 2]


class _Alone:
    """As much of a world as sampling needs."""

    rank, size, device = 0, 1, torch.device("cpu")

    def all_gather(self, value):
        return [value]


def constant(x_TC, t_I, label_I, packing, rope):
    """v = label for a class and -1 without one, the last four channels twice that."""
    value_I = torch.where(label_I == 5, -torch.ones(()), label_I.float())
    return value_I[packing.image_T][:, None] * torch.tensor([1.0] * 12 + [2.0] * 4)


@pytest.mark.parametrize("channels", ["all", "three"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_guidance(cfg, channels):
    requests = grid_requests(["32x48", "16x16"], [0, 3])

    def draw(velocity) -> dict[Request, np.ndarray]:
        options = SamplingConfig(cfg=cfg, steps=3, guided_channels=channels)
        made = sample(velocity, requests, model=MODEL, sampling=options, seed=0, world=_Alone())
        return {request: one.tokens for request, one in made.items()}

    moved, noise = draw(constant), draw(lambda x_TC, *rest: torch.zeros_like(x_TC))
    for request in requests:
        shift = moved[request] - noise[request]
        guided = -1 + cfg * (request.label + 1)
        last = 2 * (request.label if channels == "three" else guided)
        np.testing.assert_allclose(shift[..., :12], guided, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(shift[..., 12:], last, rtol=1e-5, atol=1e-5)
    assert 0.9 < np.concatenate([n.ravel() for n in noise.values()]).std() < 1.1


def test_a_class_that_the_model_has_not():
    with pytest.raises(UserError, match="class 5 is out of range: the model has classes 0 to 4"):
        sample(constant, [Request(0, 5, 1, 1)], model=MODEL, sampling=SamplingConfig(), seed=0, world=_Alone())


def test_positions_are_as_published_unless_asked_for():
    plain, scaled = RopeConfig(), RopeConfig(mode="vision_ntk", attention_scale="released")
    published = {"256x256": plain, "128x384": plain, "160x320": RopeConfig(mode="vision_ntk")}
    published |= {size: scaled for size in ("320x320", "224x448", "160x480")}
    for size, rope in published.items():
        assert rope_of(SamplingConfig(), MODEL, *parse_size(size)) == rope
    stage = MODEL.model_copy(update={"rope": RopeConfig(mode="vision_ntk")})
    for size in ("512x512", "320x640", "256x768"):
        assert rope_of(SamplingConfig(), stage, *parse_size(size)) == RopeConfig(mode="vision_ntk")
    asked = SamplingConfig(rope="yarn")
    assert rope_of(asked, MODEL, 20, 20) == RopeConfig(mode="yarn")
    asked = SamplingConfig(attention_scale="paper")
    assert rope_of(asked, MODEL, 20, 20) == RopeConfig(mode="vision_ntk", attention_scale="paper")


def test_sampling_leaves_the_run_as_it_was(tiny):
    plain = tiny("plain", train__steps=8)
    pictured = tiny("pictured", train__steps=8, sampling__every_steps=3, sampling__sizes=["32x48"], sampling__steps=2)
    assert run_ranks(2, train, plain) == run_ranks(2, train, pictured) == [0, 0]
    assert commit_bytes(plain.run) == commit_bytes(pictured.run)
    store = Run.open(pictured.run).store
    assert store.list("samples/") == ["samples/00000003.png", "samples/00000006.png", "samples/00000008.png"]
    assert Image.open(io.BytesIO(store.read("samples/00000003.png"))).size == (4 + 5 * (48 + 4), 4 + 32 + 4)


def command(*words: str) -> int:
    return main(["sample", *words])


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> str:
    config = make_tiny(dataset, tmp_path_factory.mktemp("trained"), train__steps=2)
    assert run_ranks(2, train, config) == [0, 0]
    return config.run


def test_pictures_from_a_run_and_from_its_weights(trained, tmp_path):
    weights, config = str(tmp_path / "weights.safetensors"), tmp_path / "config.yaml"
    config.write_text(json.dumps(Run.open(trained).config))
    assert main(["checkpoint", "export", trained, weights, "--ema"]) == 0
    options = ["--size", "48x32", "--size", "32x32", "--steps", "2", "--classes", "0,4,2", "--solver", "heun"]
    drawn = []
    for words in ([trained], [f"{trained}@2"], [weights, "--config", str(config), "layout.tensor=1"]):
        out = tmp_path / f"{len(drawn)}.png"
        assert run_ranks(1, command, *words, "--out", str(out), *options) == [0]
        drawn.append(out.read_bytes())
    assert Image.open(io.BytesIO(drawn[0])).size == (4 + 3 * (32 + 4), 4 + 48 + 4 + 32 + 4)
    assert drawn[0] == drawn[1] == drawn[2]


def test_compare_shows_all_ways_from_the_same_noise(trained, tmp_path):
    out = tmp_path / "ways.png"
    options = ["--size", "32x80", "--steps", "2", "--columns", "2", "--compare", "--json", "--out", str(out)]
    report, nothing = run_ranks(2, reported, trained, "model.rope.train_side=2", *options)
    assert nothing == ""
    ways = {way["way"]: way for way in json.loads(report)["ways"]}
    assert list(ways) == [
        *("none", "pi", "ntk", "yarn", "vision_ntk", "vision_yarn"),
        *("vision_ntk + paper", "vision_ntk + released"),
    ]
    assert [name for name, way in ways.items() if way["default"]] == ["vision_ntk + released"]
    waves = {name: way["longest_wave_tokens"] for name, way in ways.items()}
    assert waves["pi"]["rows"] == pytest.approx(2.5 * waves["none"]["rows"])
    assert waves["vision_yarn"]["rows"] == waves["none"]["rows"] < waves["vision_yarn"]["columns"]
    assert ways["vision_ntk + released"]["attention_factor"] == pytest.approx(np.log(20) / np.log(4))
    assert Image.open(out).width > 500


def reported(*words: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert command(*words) == 0
    return out.getvalue()


def test_many_pictures_go_on_where_they_were(trained, tmp_path):
    npz, folder = str(tmp_path / "all.npz"), tmp_path / "all"
    options = [trained, "--size", "32x48", "--folder", str(folder), "--steps", "2", "--seed", "7"]
    assert run_ranks(2, command, *options, "--images", "5") == [0, 0]
    first = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    assert sorted(first) == [f"{i:06d}.png" for i in range(5)]
    (folder / "000003.png").unlink()
    assert run_ranks(3, command, *options, "--images", "9", "--npz", npz) == [0, 0, 0]
    assert {name for name, at in first.items() if (folder / name).stat().st_mtime_ns == at} == first.keys() - {
        "000003.png"
    }
    whole = str(tmp_path / "whole.npz")
    alone = [trained, "--size", "32x48", "--folder", str(tmp_path / "whole"), "--steps", "2", "--seed", "7"]
    assert run_ranks(1, command, *alone, "--images", "9", "--npz", whole) == [0]
    with np.load(npz) as found, np.load(whole) as expected:
        assert found["arr_0"].shape == (9, 32, 48, 3) and found["arr_0"].dtype == np.uint8
        # The networks differ in the last bits, which may tip a pixel from one level to the next.
        assert np.abs(found["arr_0"].astype(int) - expected["arr_0"]).max() <= 1
        np.testing.assert_array_equal(found["arr_1"], expected["arr_1"])
        assert len(set(found["arr_1"].tolist())) > 1 and found["arr_0"].std() > 1
    with pytest.raises(SystemExit, match="cfg: 1.5 -> 3.0.*another folder"):
        run_ranks(1, refused, *options, "--images", "5", "--cfg", "3")


def refused(*words: str) -> None:
    """As a user sees it: one sentence, exit code 2."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert command(*words) == 2
    (line,) = said.getvalue().splitlines()
    raise SystemExit(line)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--size", "100x100"], "size '100x100': give HEIGHTxWIDTH in pixels, multiples of 16"),
        (["--classes", "1,5"], "--classes 1,5: give numbers from 0 to 4, separated by commas"),
        (["--classes", "0,x"], "--classes 0,x: give numbers from 0 to 4, separated by commas"),
        (["--solver", "rk4"], "solver = 'rk4': Input should be 'euler', 'heun', 'dopri5' or 'sde'"),
        (["--rope", "ntk2"], "rope = 'ntk2': Input should be"),
        (["--npz", "x.npz"], "--npz needs the number of images as --images N"),
        (["--npz", "x.npz", "--images", "2", "--size", "16x16", "--size", "16x32"], "give one --size"),
        (["--compare", "--images", "2"], "give one of the two"),
        (["--images", "2", "--folder", "pyproject.toml/in"], "cannot make the folder pyproject.toml/in: Not a"),
        (["model.hidden=64"], "another network than the run's"),
    ],
)
def test_bad_input(trained, words, sentence):
    with pytest.raises(SystemExit, match=f"fitv2: .*{sentence}"):
        run_ranks(1, refused, trained, *words)


def test_a_file_is_no_run():
    with pytest.raises(SystemExit, match="pyproject.toml is not a run"):
        run_ranks(1, refused, "pyproject.toml")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--columns", "0"], "--columns: give a whole number, 1 or more, not 0"),
        (["--images", "-3"], "--images: give a whole number, 1 or more, not -3"),
        (["--seed", "-1"], "--seed: give a whole number, 0 or more, not -1"),
        (["--out", "grid.jpg"], "--out: give a name that ends in .png, not grid.jpg"),
        (["--out", "nowhere/grid.png"], "--out: there is no folder nowhere: make it, or choose another"),
        (["--images", "2", "--npz", "nowhere/x.npz"], "--npz: there is no folder nowhere"),
    ],
)
def test_what_no_call_could_do_is_refused_at_once(words, sentence, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(["sample", "RUN", *words])
    assert f"error: argument {sentence}" in capsys.readouterr().err


def test_weights_files_that_cannot_become_pictures(trained, tmp_path):
    weights, config = str(tmp_path / "weights.safetensors"), tmp_path / "config.yaml"
    config.write_text(json.dumps(Run.open(trained).config))
    assert main(["checkpoint", "export", trained, weights, "--ema"]) == 0
    for words, sentence in (
        (["--config", str(config), "model.hidden=64"], "the config wants .* choose another config"),
        (["--config", str(config), "data.url=nowhere"], "how these latents become pictures is not known.*sampling.vae"),
        ([], "give the config of these weights as --config FILE"),
    ):
        with pytest.raises(SystemExit, match=f"fitv2: .*{sentence}"):
            run_ranks(1, refused, weights, *words)


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
