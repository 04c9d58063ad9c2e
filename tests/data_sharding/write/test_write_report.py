"""What the report says of classes whose names are numbers."""

from pathlib import Path

import pytest

from data_sharding.write.images import write_dataset
from data_sharding.write.write_report import to_text
from tests.support.pictures import file_of, noise

LINE = '  classes of numbers are sorted as text, as in torchvision: class "10" is label 2'


def report(tmp_path: Path, names: list[str]):
    for name in names:
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "1.png").write_bytes(file_of(noise(16, 16), "PNG"))
    return write_dataset(str(tmp_path / "src"), str(tmp_path / "set"), max_tokens=16, workers=1, progress=False)


def test_folders_that_are_numbers_and_sorted_as_text_are_named(tmp_path):
    found = report(tmp_path, [str(number) for number in range(12)])
    assert found.sorted_as_text == {"10": 2} and to_text(found).splitlines()[-1] == LINE
    again = write_dataset(str(tmp_path / "src"), str(tmp_path / "set"), max_tokens=16, workers=1, progress=False)
    assert to_text(again) == to_text(found)


@pytest.mark.parametrize("names", [["0", "1", "9"], ["00", "02", "10"], ["0", "10", "2", "ant"], ["²", "10", "2"]])
def test_where_the_order_is_the_same_or_names_are_names_nothing_is_said(tmp_path, names):
    assert report(tmp_path, names).sorted_as_text == {}
