"""The successor that a job queues or changes: what Slurm is told, with programs that note their arguments."""

from pathlib import Path

import pytest

from fitv2_scale.run.run import Run
from launchers.chain import Chain, after, before
from launchers.chain_log import ChainLog

PROGRAMS = {
    "sinfo": 'for n in 1 2 3 4 5; do echo "test*|node$n|idle"; done',
    "squeue": 'cat "$SAID/queue"',
    "sbatch": 'echo "sbatch $*" >>"$SAID/calls"; echo 8',
    "scontrol": 'echo "scontrol $*" >>"$SAID/calls"',
    "scancel": 'echo "scancel $*" >>"$SAID/calls"',
}


@pytest.fixture
def said(tmp_path, monkeypatch) -> Path:
    """A folder: ``queue`` is what squeue prints, ``calls`` what the other programs were called with."""
    for name, text in PROGRAMS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("SAID", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    (tmp_path / "queue").write_text("")
    return tmp_path


def submitted(folder: Path, *directives: str) -> str:
    """The home of a chain on 2 to 4 nodes, whose script has these lines."""
    run = Run.open_or_create(str(folder / "run"), {}, {}, None)
    home = folder / "home"
    home.mkdir()
    Chain(run.url, "n", str(home), 10, 2, 4, 1, "", 3, 60.0, "", False).save()
    lines = [f"#SBATCH {line}\n" for line in directives]
    (home / "job.sh").write_text("".join(["#!/bin/bash\n", *lines, "\necho begin\n#SBATCH --exclude=node5\n"]))
    ChainLog(run.store).add("SUBMIT", home=str(home), log=0, nodes="2-4", git=None)
    return str(home)


def calls(said: Path) -> list[str]:
    lines = (said / "calls").read_text().splitlines()
    (said / "calls").unlink()
    return lines


@pytest.mark.parametrize(
    "directive", ["--exclude=node[1-2]", "--exclude node1,node2", "-x node[1,2]", "-xnode1,node2", "-x./bad # broken"]
)
def test_nodes_that_the_user_excludes_stay_excluded(said, monkeypatch, directive):
    monkeypatch.chdir(said)
    (said / "bad").write_text("node1\nnode2\n")
    home = submitted(said, directive)
    assert before(home) == "train"
    assert calls(said)[0] == f"sbatch --parsable --nodes=3 --exclude=node1,node2 {home}/job.sh"

    run = Run.open(str(said / "run"))
    (said / "queue").write_text(f"8|PENDING|Dependency|{home}/job.sh\n")
    (Path(home) / "srun-7.log").write_text("srun: error: node3: task 0: Killed\n")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[3-4]")
    ChainLog(run.store).add("START", job="7", restart=0, nodes=["node3", "node4"], commits=0, attempt=0)
    assert after(home, "137") == 75
    assert [line for line in calls(said) if "JobId=8" in line] == [
        "scontrol update JobId=8 NumTasks=2 NumNodes=2-2",
        "scontrol update JobId=8 ExcNodeList=node1,node2,node3",
    ]


def test_without_such_nodes_none_are_excluded(said):
    home = submitted(said, "--comment=x")
    assert before(home) == "train"
    assert calls(said)[0] == f"sbatch --parsable --nodes=4 {home}/job.sh"
