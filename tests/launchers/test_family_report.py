"""The table and the picture of launchers/family.sh, made of what its commands leave."""

import json
import math
import shutil
from pathlib import Path

import pytest
from PIL import Image

from launchers.family_report import main, rows_of
from tests.oracle.network import Form, shapes

LOSSES = {
    ("fitv2", "auto"): {25: 0.9, 100: 0.75, 256: 0.5},
    ("dit", "pi"): {25: 0.3, 100: 0.2, 256: 0.5},
    ("dit", "none"): {25: 0.4, 100: 0.2, 256: 0.6},
}


@pytest.fixture
def folder(two_step_run, tmp_path) -> Path:
    for name in ("fitv2", "dit"):
        shutil.copytree(two_step_run, tmp_path / name)
    for (family, mode), losses in LOSSES.items():
        for tokens, loss in losses.items():
            (tmp_path / f"{family}-{mode}-{tokens}.json").write_text(json.dumps({"val_loss_ema": loss}))
        for size, color in (("160x160", "red"), ("80x80", "blue")):
            height, width = map(int, size.split("x"))
            Image.new("RGB", (3 * width, height), color).save(tmp_path / f"{family}-{mode}-{size}.png")
    return tmp_path


def test_the_table_has_each_loss_and_its_part_of_that_of_the_training_s_size(folder, capsys):
    assert main([str(folder)]) == 0
    lines = (folder / "family.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "parameters", "images", "TFLOP", "25 tokens", "100 tokens", "256 tokens"]
    by_name = {row[0]: row[1:] for row in cells[2:]}
    assert list(by_name) == ["FiTv2", "DiT", "DiT, positions interpolated (PI)"]
    assert by_name["FiTv2"][3:] == ["0.900 (1.20)", "0.750 (1.00)", "0.500 (0.67)"]
    assert by_name["DiT, positions interpolated (PI)"][3:] == ["0.300 (1.50)", "0.200 (1.00)", "0.500 (2.50)"]
    parameters = sum(math.prod(shape) for shape in shapes(Form()).values())
    assert by_name["FiTv2"][:2] == [f"{parameters:,}", "24"]  # of 2 steps of 12 images
    assert capsys.readouterr().out.startswith("| ")


def test_the_picture_has_a_row_for_each_network_and_a_column_for_each_size(folder):
    assert main([str(folder)]) == 0
    assert rows_of(folder) == [("fitv2", "auto"), ("dit", "none"), ("dit", "pi")]
    with Image.open(folder / "family.png") as picture:
        colors = [c for c in picture.convert("RGB").resize((60, 30), Image.Resampling.NEAREST).get_flattened_data()]
    assert (255, 0, 0) in colors and (0, 0, 255) in colors


def test_a_folder_without_losses_is_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no losses: give the folder that launchers/family.sh made" in capsys.readouterr().err
