"""What Slurm's programs print becomes, with a squeue that prints it."""

import pytest

from fitv2_scale.cli.__main__ import main
from fitv2_scale.run.run import Run
from launchers import slurm
from launchers.chain_log import ChainLog
from launchers.slurm import Job

SQUEUE = """#!/bin/sh
echo '12|RUNNING|None|/h/job.sh'
echo '7_[2-3%1]|PENDING|PartitionTimeLimit|/h/job.sh'
echo '13|PENDING|Dependency|/h/job.sh'
"""


@pytest.fixture(autouse=True)
def programs(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"squeue": SQUEUE, "sbatch": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_jobs_are_listed_by_age_and_an_array_is_one_of_them():
    """Its number is not a whole one."""
    script = "/h/job.sh"
    assert slurm.queue("fitv2-run") == [
        Job("7_[2-3%1]", "PENDING", "PartitionTimeLimit", script),
        Job("12", "RUNNING", "None", script),
        Job("13", "PENDING", "Dependency", script),
    ]


def test_status_says_why_jobs_are_pending(tmp_path, capfd):
    run = Run.open_or_create(str(tmp_path / "run"), {}, {}, None)
    assert main(["status", run.url]) == 0
    assert "pending" not in capfd.readouterr().out  # it was never submitted
    ChainLog(run.store).add("SUBMIT", home=str(tmp_path), log=0, nodes="1", git=None)
    assert main(["status", run.url]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.strip() for line in lines if "pending" in line] == [
        "job 7_[2-3%1]: pending (PartitionTimeLimit)",
        "job 13: pending (Dependency)",
    ]
