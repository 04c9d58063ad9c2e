"""The successor that a job queues or changes: what Slurm is told, with programs that note their arguments."""

from pathlib import Path

import pytest

from fitv2_scale.cli.__main__ import main
from fitv2_scale.run.run import Run
from launchers.chain import Chain, after, before
from launchers.chain_log import ChainLog
from launchers.control import chain
from launchers.slurm import most_nodes

PROGRAMS = {
    "sinfo": 'for n in 1 2 3 4 5; do echo "test*|node$n|idle"; done',
    "squeue": 'cat "$SAID/queue"',
    "sbatch": """nodes=$(expr "$*" : '.*--nodes=\\([0-9]*\\)')
case $1 in
--test-only) [ "$nodes" -le "$(cat "$SAID/possible")" ] && exit
  echo "allocation failure: $(cat "$SAID/answer")" >&2; exit 1 ;;
*) echo "sbatch $*" >>"$SAID/calls"
  [ -e "$SAID/full" ] && { echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }; echo 8 ;;
esac""",
    "scontrol": 'echo "scontrol $*" >>"$SAID/calls"; [ "$1" != requeue ] || [ ! -e "$SAID/disabled" ]',
    "scancel": 'echo "scancel $*" >>"$SAID/calls"',
}


@pytest.fixture
def said(tmp_path, monkeypatch) -> Path:
    """A folder: ``queue`` is what squeue prints, ``calls`` what the other programs were called with; for more than
    ``possible`` nodes, sbatch --test-only fails with ``answer``. If ``full`` exists, no job can
    be queued; if ``disabled`` does, none requeued."""
    for name, text in PROGRAMS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("SAID", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    (tmp_path / "queue").write_text("")
    (tmp_path / "possible").write_text("5")
    (tmp_path / "answer").write_text("Requested node configuration is not available")
    return tmp_path


def submitted(folder: Path, *directives: str, on_event: str = "") -> str:
    """The home of a chain on 2 to 4 nodes, whose script has these lines."""
    run = Run.open_or_create(str(folder / "run"), {}, {}, None)
    home = folder / "home"
    home.mkdir()
    Chain(run.url, "n", str(home), 10, 2, 4, 1, "", 3, 60.0, on_event, False).save()
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


def test_a_list_of_nodes_that_is_gone_does_not_end_the_chain(said, monkeypatch, capsys):
    monkeypatch.chdir(said)
    assert before(submitted(said, "--exclude=./gone")) == "train"
    assert "no successor: slurm.extra has --exclude=./gone, which cannot be read" in capsys.readouterr().err


def test_without_such_nodes_none_are_excluded(said):
    home = submitted(said, "--comment=x")
    assert before(home) == "train"
    assert calls(said)[0] == f"sbatch --parsable --nodes=4 {home}/job.sh"


@pytest.mark.parametrize(
    "possible,answer,nodes",
    [
        (5, "", 4),
        (3, "Requested node configuration is not available", 3),
        (2, "Requested node configuration is not available", 2),
        (1, "Requested node configuration is not available", 2),
        (2, "Job violates accounting/QOS policy", 4),  # it is not about nodes
    ],
)
def test_no_more_nodes_are_asked_for_than_slurm_could_give(said, possible, answer, nodes):
    """...by a constraint or a reservation, which only Slurm can judge."""
    (said / "possible").write_text(str(possible))
    (said / "answer").write_text(answer)
    home = submitted(said, "--constraint=fast")
    assert before(home) == "train"
    assert calls(said)[0] == f"sbatch --parsable --nodes={nodes} {home}/job.sh"


@pytest.mark.parametrize("possible", range(2, 40, 6))
def test_the_largest_possible_number_of_nodes_is_found(said, possible):
    (said / "possible").write_text(str(possible))
    assert most_nodes("", 3, 37) == min(max(possible, 3), 37)


def ended(home: str, signal: str = "USR1") -> int:
    """The exit code of the job at its end, which began as the first of its chain."""
    assert before(home) == "train"
    return after(home, signal)


def test_a_job_that_may_have_no_successor_is_its_own(said):
    """A limit of one job per user: Slurm does not requeue what ends with 75 by itself."""
    home = submitted(said)
    (said / "full").touch()
    assert ended(home) == 75
    assert calls(said)[-1] == "scontrol requeue 7"
    assert chain(Run.open(str(said / "run")))["event"] is None


def test_a_chain_that_ends_for_want_of_a_successor_says_so(said, capfd):
    home = submitted(said, on_event=f"echo >>{said}/event")
    for name in ("full", "disabled"):
        (said / name).touch()
    assert ended(home) == 75
    reason = "sbatch fails: QOSMaxSubmitJobPerUserLimit"
    assert (said / "event").read_text() == f"no-successor {said}/run {reason}\n"
    assert main(["status", f"{said}/run"]) == 0
    assert f"chain: no-successor  {reason}: submit again" in capfd.readouterr().out
    (said / "full").unlink()
    assert before(home) == "train"  # somebody has requeued it
    assert chain(Run.open(str(said / "run")))["event"] is None


def test_a_successor_that_is_there_suffices(said):
    home = submitted(said)
    (said / "full").touch()
    (said / "queue").write_text(f"8|PENDING|Dependency|{home}/job.sh\n")
    assert ended(home) == 75
    assert not [line for line in calls(said) if line.startswith(("sbatch", "scontrol requeue"))]
