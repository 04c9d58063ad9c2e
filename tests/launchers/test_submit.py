"""The folder of a job's files: what is in it, and one sentence if it cannot be written."""

import errno
import os
from pathlib import Path

import pytest
import yaml

from data_sharding.errors import UserError
from fitv2_scale.run.run import Run
from launchers.submit import submit, write_home
from tests.support.faulty_disk import FaultyDisk


@pytest.mark.parametrize(
    "number,part,said",
    [
        (errno.ENOSPC, "/code/fitv2_scale/data.py", "the code cannot be copied to .*/code: .*No space left on device"),
        (errno.ENOSPC, "/home/config.yaml", "home cannot be written: No space left on device; free some space there"),
        (errno.EACCES, "/home/config.yaml", "home cannot be used: Permission denied; check who owns it"),
    ],
)
def test_a_home_that_cannot_be_written_is_a_sentence(tiny, tmp_path, monkeypatch, number, part, said):
    FaultyDisk(monkeypatch).fail(number, part, "open")
    with pytest.raises(UserError, match=said):
        write_home(tmp_path / "home", tiny(), "run")


def test_a_home_below_a_file_is_a_sentence(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/home/code cannot be used: Not a directory"):
        write_home(tmp_path / "file/home", tiny(), "run")


@pytest.mark.parametrize("extra", ["--chdir=/tmp", "-D /tmp", "--chd /tmp"])
def test_a_job_that_begins_in_another_folder_finds_its_files(tiny, tmp_path, monkeypatch, extra):
    """Data, cache and the parent of a fork, given as paths relative to the current folder."""
    nodes = "case $* in *--Node*) echo 'test*|n1|idle' ;; *) echo 'test*|10:00' ;; esac"
    for name, text in {"sinfo": nodes, "squeue": "", "sbatch": "echo 8", "scancel": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    parent = Run.open_or_create(str(tmp_path / "parent"), {}, {}, None)
    parent.claim({}).commit(3, "steps/3", "0c9d")
    (tmp_path / "link").symlink_to(Path(tiny().data.url).parent)
    config = tiny(
        slurm={"gpus": "none", "tasks_per_node": 1, "walltime": "9", "extra": [extra]},
        data__url=f"link/{Path(tiny().data.url).name}",
        data__cache_dir="cache",
        run="child",
    )
    done = submit(config, "1", dry_run=False, fork_from="parent@3")
    (home,) = (tmp_path / "child/jobs").iterdir()
    written = yaml.safe_load((home / "config.yaml").read_text())
    assert written["data"]["url"] == os.path.join(tmp_path, "link", Path(tiny().data.url).name)
    assert written["data"]["cache_dir"] == f"{tmp_path}/cache" and written["run"] == f"{tmp_path}/child"
    assert f"--fork-from {tmp_path}/parent@3 " in done.script


def test_an_advice_that_cannot_be_given_says_why(tiny, monkeypatch):
    def refuse(*_):
        raise UserError("the model does not fit these GPUs")

    monkeypatch.setattr("launchers.submit.node_advice", refuse)
    config = tiny(slurm={"gpus": "gres", "tasks_per_node": 1, "walltime": "9"})
    assert submit(config, "1", dry_run=True).advice == "the model does not fit these GPUs"
