"""What a task of a job does before its command. More of it, as processes of their own, is in test_batch_script."""

import os
import sys

import pytest
import yaml

from fitv2_scale.cli import slurm_task
from launchers import preflight
from launchers.preflight import CheckReport, Finding

TASK = {
    "SLURM_JOB_ID": "4711", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "n[03-04]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURMD_NODENAME": "n04",
}  # fmt: skip


@pytest.mark.parametrize("own,code", [(True, 1), (False, 0)])
def test_a_task_does_not_train_where_a_node_is_not_fit(own, code, tiny, tmp_path, monkeypatch, capsys):
    """The node at fault names itself; the task of another one ends well, so that srun blames the first."""
    monkeypatch.setattr(os, "environ", os.environ | TASK | {"TMPDIR": str(tmp_path)})
    config, checked = tiny(slurm__doctor=True), []

    def check_nodes(config):
        checked.append(config)
        return CheckReport([Finding("clock", "rank 1: an hour late", "", 0.1)], own)

    monkeypatch.setattr(preflight, "check_nodes", check_nodes)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    monkeypatch.setattr(sys, "argv", ["slurm_task", "train", str(tmp_path / "config.yaml")])
    assert slurm_task.main() == code
    said = capsys.readouterr()
    assert said.out == "== job 4711 task 1 on n04\n" and checked == [config]
    assert said.err == "n04 is not fit for training: clock: rank 1: an hour late\n" * own
    assert not (tmp_path / "run").exists()
