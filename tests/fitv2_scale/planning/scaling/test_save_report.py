"""The files of a report that cannot be written: one sentence."""

import errno

import pytest

from data_sharding.errors import StorageDown, UserError
from fitv2_scale.planning.scaling.curves_report import Analysis, CurvesOptions
from fitv2_scale.planning.scaling.predictions import PredictionFile
from fitv2_scale.planning.scaling.save_report import draw, write
from tests.support.faulty_disk import FaultyDisk

NOTHING = Analysis("loss", [], None, None, [])
REPORT = {"metric": None, "runs": [{"name": "a"}]}


@pytest.mark.parametrize("name", ["curves.json", "curves.txt", "runs.csv", "predictions.jsonl"])
def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch, name):
    disk = FaultyDisk(monkeypatch)
    disk.fail(errno.ENOSPC, name, "open")
    with pytest.raises(StorageDown, match="cannot be written: No space left on device; free some space there"):
        PredictionFile(tmp_path).add({"step": 1})
        write(REPORT, "text", tmp_path)
    assert disk.met == 1


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("file", "file/deeper"):
        with pytest.raises(UserError, match=f"{folder} cannot be used: .*give another path, or remove"):
            draw(NOTHING, CurvesOptions(tmp_path / folder))
