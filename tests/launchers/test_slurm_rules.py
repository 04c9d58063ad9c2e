"""Slurm's own rules decide where a job runs, who pays and how long: real sbatch, jobs that mostly never start."""

import re
from pathlib import Path

import pytest

from fitv2_scale.run.run import Run
from launchers.control import job_name
from tests.support.repository import ROOT
from tests.support.slurm_jobs import queue, wait_for_the_end

pytestmark = pytest.mark.slurm


def held(slurm, name: str, columns: str) -> list[str]:
    return slurm.run("squeue", "--all", "--noheader", "--name", name, "--format", columns).splitlines()


def test_partition_and_account_of_the_shell_are_taken(slurm, fitv2, job_config, tiny, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "test,short")
    monkeypatch.setenv("SBATCH_ACCOUNT", "myproject")
    monkeypatch.setenv("SQUEUE_PARTITION", "hidden")  # must not hide the run's jobs from it
    config = tiny()
    fitv2("submit", job_config(), "slurm.extra=[--hold]", "slurm.walltime=2", "slurm.signal_seconds=10")
    monkeypatch.delenv("SQUEUE_PARTITION")
    assert held(slurm, job_name(Run.open(config.run).id), "%P|%a") == ["test,short|myproject"]
    assert "(JobHeldUser)" in fitv2("status", config.run)
    assert "is cancelled" in fitv2("stop", config.run) and not queue(slurm)


def test_several_and_hidden_partitions_are_slurm_s_business(slurm, fitv2, job_config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # jobs/ lies in the current folder
    for partition in ("test,short", "hidden"):
        fitv2(
            "submit",
            "slurm.extra=[--hold]",
            "slurm.gpus=none",
            "slurm.tasks_per_node=1",
            "slurm.walltime=2",
            f"slurm.partition={partition}",
            "--",
            "plan",
            "x",
        )
        assert held(slurm, "fitv2-plan-x", "%P") == [partition]
        slurm.run("scancel", "--name", "fitv2-plan-x")
    said = fitv2("submit", job_config(), "slurm.partition=nosuch", code=2)
    assert "invalid partition" in said.lower() and "short, test)" in said  # root sees hidden ones


def test_a_job_that_could_never_start_is_refused(slurm, fitv2, job_config, tiny):
    for key in ("slurm.partition=short", "slurm.extra=[-p short]"):
        said = fitv2("submit", job_config(), key, "slurm.walltime=60", code=2)
        assert "slurm.walltime=60 is above the limit of partition short, 2 minutes" in said
    said = fitv2("submit", job_config(), "slurm.walltime=2:00:00", code=2)
    assert "is above the limit of the default partition, 60 minutes" in said
    assert not queue(slurm) and not Path(tiny().run).exists()


def test_no_gpus_names_the_key(slurm, fitv2, job_config):
    said = fitv2("submit", job_config(), "slurm.gpus=gres", code=2)
    assert "slurm.gpus says how GPUs are requested" in said


def test_an_array_and_a_secret_that_would_be_lost_are_refused(slurm, fitv2, job_config, tiny):
    assert "slurm.extra has --array" in fitv2("submit", job_config(), "slurm.extra=[--array=1-3%1]", code=2)
    uri = "tracking.uri=http://me:s3cret@127.0.0.1:1"
    said = fitv2("submit", job_config(), "slurm.extra=[--export=NONE]", uri, code=2)
    assert "tracking.uri contains a secret" in said and "s3cret" not in said
    assert not queue(slurm) and not Path(tiny().run).exists()


def test_a_path_that_slurm_would_fill_in(slurm, fitv2, tmp_path):
    """...of a job that gets almost no variables of the shell."""
    folder = tmp_path / "50%j of 100%"
    site = ["slurm.gpus=none", "slurm.tasks_per_node=1", f"slurm.folder={folder}"]
    site += ["slurm.walltime=5", "slurm.extra=[--export=HOME]"]
    fitv2("submit", *site, "--", "config", "show", str(ROOT / "configs/demo.yaml"), "train.steps=123")
    wait_for_the_end(slurm)
    (home,) = folder.iterdir()
    (output,) = home.glob("job-[0-9]*.out")
    assert re.search(r"^train\.steps = 123 ", output.read_text(), re.M)


@pytest.mark.parametrize("extra,nodes", [("--exclude=node1", "3"), ("-w node[1-2]", "2"), ("-p short", "2")])
def test_a_range_of_nodes_is_what_slurm_can_give(slurm, fitv2, job_config, tiny, extra, nodes):
    config = tiny()
    site = ["slurm.walltime=2", "slurm.signal_seconds=10", f"slurm.extra=[--hold,'{extra}']"]
    fitv2("submit", job_config(), *site, "--nodes", "1-4")
    assert held(slurm, job_name(Run.open(config.run).id), "%D") == [nodes]
    fitv2("stop", config.run)
