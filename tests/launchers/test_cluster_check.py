"""Which time limits could never be granted, with a sinfo that prints what Slurm's would."""

from pathlib import Path

import pytest

from data_sharding.errors import UserError
from fitv2_scale.config.slurm import SlurmConfig
from launchers.cluster_check import check_cluster
from launchers.submit import submit

SINFO = """#!/bin/sh
echo 'test*|1:00:00'
echo 'short|2:00'
echo 'endless|infinite'
case "$*" in *--all*) echo 'hidden|10:00:00' ;; esac
"""


@pytest.fixture(autouse=True)
def programs(tmp_path, monkeypatch):
    for name, text in {"sinfo": SINFO, "sbatch": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.parametrize(
    "partition,minutes",
    [("", 60), ("test", 60), ("short", 2), ("test,short", 60), ("hidden", 600)],
)
def test_the_longest_limit_can_be_asked_for_and_no_more(partition, minutes):
    check_cluster(SlurmConfig(partition=partition, walltime=str(minutes)))
    with pytest.raises(UserError, match=f"slurm.walltime={minutes + 1} is above the limit of .* {minutes} minutes: "):
        check_cluster(SlurmConfig(partition=partition, walltime=str(minutes + 1)))


def test_nothing_is_submitted_that_could_never_start(tiny, tmp_path):
    site = {"gpus": "none", "tasks_per_node": 1, "walltime": "61", "folder": str(tmp_path / "jobs")}
    with pytest.raises(UserError, match="slurm.walltime=61 is above the limit of the default partition, 60 minutes"):
        submit(tiny(slurm=site), "1", dry_run=False)
    assert not (tmp_path / "jobs").exists() and not Path(tiny().run).exists()


@pytest.mark.parametrize(
    "asked",
    [
        {"qos": "long"},
        {"extra": ["--qos=long"]},
        {"extra": ["-q long"]},
        {"extra": ["--time-min=2"]},
        {"walltime": ""},  # that of the partition
        {"walltime": "0", "partition": "endless"},
        {"walltime": "0", "partition": "short,endless"},
    ],
)
def test_what_slurm_would_start_is_not_refused(asked):
    """...though its limit is above that of the partition."""
    check_cluster(SlurmConfig(**({"partition": "short", "walltime": "3"} | asked)))


def test_what_slurm_would_never_start_is_named():
    with pytest.raises(UserError, match="^--time-min=3 is above the limit of partition short, 2 minutes"):
        check_cluster(SlurmConfig(partition="short", walltime="9", extra=["--time-min 3"]))
    with pytest.raises(UserError, match="^slurm.walltime=0 is above the limit of partition short, 2 minutes"):
        check_cluster(SlurmConfig(partition="short", walltime="0"))  # no limit at all


def test_a_job_without_a_limit_has_time_to_train(tiny, tmp_path):
    site = {"gpus": "none", "tasks_per_node": 1, "walltime": "0", "folder": str(tmp_path / "jobs")}
    assert "#SBATCH --time=0" in submit(tiny(slurm=site), "1", dry_run=True).script


def test_a_partition_that_slurm_does_not_know_is_left_to_slurm():
    check_cluster(SlurmConfig(partition="nosuch", walltime="9000"))


def test_without_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="sbatch is not on this machine: use a login node"):
        check_cluster(SlurmConfig())
