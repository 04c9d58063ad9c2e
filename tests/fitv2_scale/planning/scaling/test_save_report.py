"""The files of a report that cannot be written: one sentence."""

import errno
from unittest.mock import Mock

import pytest

from data_sharding.errors import StorageDown, UserError
from fitv2_scale.planning.scaling.curves_report import Analysis, CurvesOptions
from fitv2_scale.planning.scaling.predictions import PredictionFile
from fitv2_scale.planning.scaling.save_report import draw, publish, write
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


def test_fits_and_predictions_reach_mlflow_with_their_steps(tmp_path, monkeypatch):
    """A fit is of no step; what is predicted is of one."""
    from fitv2_scale.tracking import mlflow_writer

    server = Mock()
    monkeypatch.setattr(mlflow_writer, "Server", server)
    run = server.return_value.open_run.return_value
    prediction = {"of": "a@700", "value": 0.5, "low": 0.4, "high": None, "measured": None, "step": 700}
    runs = [{"name": "a", "fit": {"floor": {"value": 0.3}}}, {"name": "b", "fit": None}]
    surface = {"fit": {"alpha": {"value": 0.2}}}
    report = {"metric": None, "runs": runs, "surface": surface, "predictions": [prediction], "scored": []}
    publish(report, [tmp_path / "curves.txt"], "sqlite:///none", "curves")
    (logged,) = run.log_metrics.call_args.args
    assert [(name, value, step) for name, value, _, step in logged] == [
        ("surface/alpha", 0.2, 0),
        ("a/floor", 0.3, 0),
        ("prediction/a/value", 0.5, 700),
        ("prediction/a/low", 0.4, 700),
    ]
    run.log_params.assert_called_once_with({"metric": "fid", "runs": "a, b"})
    run.log_artifact.assert_called_once_with(tmp_path / "curves.txt", "curves")
