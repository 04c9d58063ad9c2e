"""The demo's crops of photographs, and the packages they come from."""

import math
import subprocess

import numpy as np
import pytest
from PIL import Image

from data_sharding.write.views import (
    resize_tokens,
)
from launchers import demo_images
from tests.support.repository import ROOT


def test_the_demos_crops_are_the_same_every_time_and_of_natural_lengths(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    assert demo_images.main([str(tmp_path / "a"), "--crops", "240"]) == 0
    demo_images.write_photographs(tmp_path / "b", 240)
    files = sorted(f.relative_to(tmp_path / "a") for f in (tmp_path / "a").rglob("*.jpg"))
    assert len(files) == 240 and len({f.parent for f in files}) == len(demo_images.PHOTOGRAPHS)
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    sizes = [Image.open(tmp_path / "a" / file).size for file in files]
    resize = np.array([math.prod(resize_tokens(h, w, 100)) for w, h in sizes])
    crop = np.array([min(size) > 160 for size in sizes])
    assert 64 <= np.where(crop, (resize + 100) / 2, resize).mean() <= 100
    assert 0.25 < crop.mean() < 0.75 and len(set(sizes)) > 200 and len(set(resize.tolist())) > 15
    aspects = np.array([w / h for w, h in sizes])
    assert (aspects < 1).mean() > 0.1 and (aspects > 1.4).mean() > 0.1
    draws = np.array([0.5, 0.5, 0.1, 0.9, 0.0])
    whole = demo_images._open(demo_images.PHOTOGRAPHS[0])
    small, large = (demo_images.crop(whole, draws, scale) for scale in (1, 2))
    assert large.size == pytest.approx(2 * np.array(small.size), abs=1)
    assert np.abs(np.asarray(large.resize(small.size, Image.Resampling.BOX), int) - np.asarray(small)).mean() < 8
    credits = (tmp_path / "a/CREDITS.txt").read_text()
    assert all(f"{p.name}: {p.credit}" in credits for p in demo_images.PHOTOGRAPHS)


def test_the_first_crops_are_those_of_every_version(tmp_path):
    """Figures in PERFORMANCE.md were measured on them."""
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    demo_images.write_photographs(tmp_path, 6)
    found = {file.parent.name: Image.open(file).size for file in tmp_path.rglob("*.jpg")}
    assert found == {
        **{"astronaut": (215, 272), "cat": (360, 175), "coffee": (372, 186)},
        **{"flower": (318, 191), "pagoda": (170, 76), "rocket": (166, 121)},
    }


def test_missing_packages_are_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_images, "PHOTOGRAPHS", (demo_images.Photograph("x", "no_such_package", "x.png", ""),))
    assert demo_images.main([str(tmp_path)]) == 2
    assert "pip install -e '.[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["50", "0100", "many"])
def test_the_demo_takes_a_number_of_steps(steps):
    """Of fewer, all would be done before its processes are killed. It is refused before anything is made."""
    demo = subprocess.run(["bash", ROOT / "launchers/demo.sh", steps], capture_output=True, text=True)
    told = f"{steps} is no number of steps: give one from 100 on, as in launchers/demo.sh 200\n"
    assert (demo.returncode, demo.stdout, demo.stderr) == (2, "", told)
