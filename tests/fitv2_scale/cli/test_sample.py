"""`fitv2 sample`: pictures from a run and from weights, its comparison, folders of many, bad input."""

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from fitv2_scale.cli.__main__ import main
from fitv2_scale.run.run import Run
from fitv2_scale.train.loop import train
from tests.support.ranks import run_ranks


def command(*words: str) -> int:
    return main(["sample", *words])


def test_what_the_weights_are_is_said_as_far_as_it_is_known(two_step_run, tmp_path, capsys):
    """Whether a file holds raw or EMA weights, it does not say."""
    weights, config = str(tmp_path / "raw.safetensors"), tmp_path / "config.yaml"
    config.write_text(json.dumps(Run.open(two_step_run).config))
    assert main(["checkpoint", "export", two_step_run, weights]) == 0
    options = ["--size", "32x32", "--steps", "2", "--columns", "1", "--out", str(tmp_path / "a.png")]
    capsys.readouterr()
    assert command(two_step_run, *options) == command(weights, "--config", str(config), *options) == 0
    of_run, of_file = capsys.readouterr().out.splitlines()
    assert f"images from the EMA weights of {two_step_run}@2, NFE 2" in of_run
    assert f"images from the weights in {weights}, NFE 2" in of_file


def test_pictures_from_a_run_and_from_its_weights(two_step_run, tmp_path):
    weights, config = str(tmp_path / "weights.safetensors"), tmp_path / "config.yaml"
    config.write_text(json.dumps(Run.open(two_step_run).config))
    assert main(["checkpoint", "export", two_step_run, weights, "--ema"]) == 0
    options = ["--size", "48x32", "--size", "32x32", "--steps", "2", "--classes", "0,4,2", "--solver", "heun"]
    drawn = []
    for words in ([two_step_run], [f"{two_step_run}@2"], [weights, "--config", str(config), "layout.tensor=1"]):
        out = tmp_path / f"{len(drawn)}.png"
        assert run_ranks(1, command, *words, "--out", str(out), *options) == [0]
        drawn.append(out.read_bytes())
    assert Image.open(io.BytesIO(drawn[0])).size == (4 + 3 * (32 + 4), 4 + 48 + 4 + 32 + 4)
    assert drawn[0] == drawn[1] == drawn[2]


def test_compare_shows_all_ways_from_the_same_noise(two_step_run, tmp_path):
    out = tmp_path / "ways.png"
    options = ["--size", "32x80", "--steps", "2", "--columns", "2", "--compare", "--json", "--out", str(out)]
    report, nothing = run_ranks(2, reported, two_step_run, "model.rope.train_side=2", *options)
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


def test_an_option_for_positions_of_another_kind_is_refused(two_step_run, capsys):
    assert command(two_step_run, "--sincos", "ei") == 2
    assert capsys.readouterr().err == "fitv2: this network has model.position=rope: leave out --sincos\n"


def reported(*words: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert command(*words) == 0
    return out.getvalue()


def test_many_pictures_continue_where_they_were(two_step_run, tmp_path):
    npz, folder = str(tmp_path / "all.npz"), tmp_path / "all"
    options = [two_step_run, "--size", "32x48", "--folder", str(folder), "--steps", "2", "--seed", "7"]
    assert run_ranks(2, command, *options, "--images", "5") == [0, 0]
    first = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    assert sorted(first) == [f"{i:06d}.png" for i in range(5)]
    (folder / "000003.png").unlink()
    assert run_ranks(3, command, *options, "--images", "9", "--npz", npz) == [0, 0, 0]
    assert {name for name, at in first.items() if (folder / name).stat().st_mtime_ns == at} == first.keys() - {
        "000003.png"
    }
    whole = str(tmp_path / "whole.npz")
    alone = [two_step_run, "--size", "32x48", "--folder", str(tmp_path / "whole"), "--steps", "2", "--seed", "7"]
    assert run_ranks(1, command, *alone, "--images", "9", "--npz", whole) == [0]
    with np.load(npz) as found, np.load(whole) as expected:
        assert found["arr_0"].shape == (9, 32, 48, 3) and found["arr_0"].dtype == np.uint8
        # The networks differ in the last bits, which may tip a pixel from one level to the next.
        assert np.abs(found["arr_0"].astype(int) - expected["arr_0"]).max() <= 1
        np.testing.assert_array_equal(found["arr_1"], expected["arr_1"])
        assert len(set(found["arr_1"].tolist())) > 1 and found["arr_0"].std() > 1
    with pytest.raises(SystemExit, match="cfg: 1.5 -> 3.0.*another folder"):
        run_ranks(1, refused, *options, "--images", "5", "--cfg", "3")


def test_pictures_of_a_network_with_larger_patches(tiny, tmp_path):
    """A token has 32 pixels on a side: of one grid, of single images, of the comparison of its positions."""
    config = tiny(train__steps=2, model__patch=4)
    assert run_ranks(2, train, config) == [0, 0]
    out, folder, npz = (str(tmp_path / name) for name in ("grid.png", "folder", "all.npz"))
    assert run_ranks(1, command, config.run, "--size", "32x96", "--columns", "2", "--steps", "2", "--out", out) == [0]
    assert Image.open(out).size == (4 + 2 * (96 + 4), 4 + 32 + 4)
    for images in ("2", "3"):  # the second call makes one more
        single = ["--size", "64x96", "--images", images, "--steps", "2", "--folder", folder, "--npz", npz]
        assert run_ranks(2, command, config.run, *single) == [0, 0]
    with np.load(npz) as found:
        assert found["arr_0"].shape == (3, 64, 96, 3)
    assert run_ranks(1, command, config.run, "--compare", "--size", "64x64", "--steps", "1", "--out", out) == [0]
    with pytest.raises(SystemExit, match=r"fitv2: size '48x96': give HEIGHTxWIDTH in pixels, multiples of 32 "):
        run_ranks(1, refused, config.run, "--size", "48x96")


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
        (["--solver", "rk4"], "solver = 'rk4': Input should be 'euler', 'heun', 'dopri5', 'sde', 'ddpm' or 'ddim'"),
        (["--rope", "ntk2"], "rope = 'ntk2': Input should be"),
        (["--npz", "x.npz"], "give their number as --images N, or leave out --npz"),
        (["--folder", "d", "--out", "g.png"], "give their number as --images N, or leave out --folder"),
        (
            ["--images", "2", "--out", "g.png", "--columns", "1"],
            "makes single images, no grid: leave out --out, --columns",
        ),
        (["--images", "2", "--columns", "8"], "makes single images, no grid: leave out --columns"),
        (["--compare", "--folder", "d"], "--compare makes one grid: leave out --folder"),
        (["--npz", "x.npz", "--images", "2", "--size", "16x16", "--size", "16x32"], "give one --size"),
        (["--compare", "--images", "2"], "makes single images, no grid: leave out --compare"),
        (["--images", "2", "--folder", "pyproject.toml/in"], "cannot make the folder pyproject.toml/in: Not a"),
        (["model.hidden=64"], "another network than the run's"),
    ],
)
def test_bad_input(two_step_run, words, sentence):
    with pytest.raises(SystemExit, match=f"fitv2: .*{sentence}"):
        run_ranks(1, refused, two_step_run, *words)


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


def test_weights_files_that_cannot_become_pictures(two_step_run, tmp_path):
    weights, config = str(tmp_path / "weights.safetensors"), tmp_path / "config.yaml"
    config.write_text(json.dumps(Run.open(two_step_run).config))
    assert main(["checkpoint", "export", two_step_run, weights, "--ema"]) == 0
    for words, sentence in (
        (["--config", str(config), "model.hidden=64"], "model.hidden is 32, not 64.*: set these keys so"),
        (["--config", str(config), "data.url=nowhere"], "the codec of these latents is not known.*sampling.vae"),
        ([], "give the config of these weights as --config FILE"),
    ):
        with pytest.raises(SystemExit, match=f"fitv2: .*{sentence}"):
            run_ranks(1, refused, weights, *words)
