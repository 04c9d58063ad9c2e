"""Chains of jobs on a real Slurm: real slurmctld and slurmd's, real checkpoints, a tiny model."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from lineage import commit_bytes, losses, trained
from ranks import run_ranks
from services.slurm import Slurm, missing
from test_resume import reach

from fitv2_scale.cli import main
from fitv2_scale.run import Run, status
from fitv2_scale.train import DONE, train
from launchers.control import jobs

# Minutes each, and sensitive to a busy machine: with --long.
pytestmark = [pytest.mark.services, pytest.mark.long]

PARTITION = "test"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if absent := missing():
        pytest.skip(f"no Slurm: {', '.join(absent)} missing (as root, tests/run.sh installs Slurm)")
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def slurm(cluster, monkeypatch):
    """The cluster, all its nodes idle, and this process a login node of it."""
    cluster.wait_for_idle()
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.run("scancel", "--user=root", "--state=PENDING")
    cluster.run("scancel", "--user=root", "--signal=KILL", "--full")


@pytest.fixture
def config_file(tiny, tmp_path):
    """``config_file("name", train__steps=10)``: a YAML file of conftest's tiny config, on a cluster without GPUs."""

    def write(name: str = "run", **changes) -> str:
        site = {"slurm__gpus": "none", "slurm__tasks_per_node": 1, "slurm__walltime": "10"}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tiny(name, **site, **changes).model_dump(mode="json")))
        return str(path)

    return write


@pytest.fixture
def fitv2(capfd):
    """Runs the program; gives what it printed. Fails if its exit code is not ``code``."""

    def run(*words: str, code: int = 0) -> str:
        got = main(list(words))
        said = capfd.readouterr()
        assert got == code, said.err
        return said.out if code == 0 else said.err

    return run


def wait(what: str, ready: Callable[[], object], seconds: float = 180):
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)
    return found


def queue(slurm: Slurm) -> list[str]:
    return slurm.run("squeue", "--noheader", "--format=%i %T").splitlines()


def wait_for_the_end(slurm: Slurm, seconds: float = 240) -> None:
    wait("an empty queue", lambda: not queue(slurm), seconds)


def attempts(run: str) -> list[tuple]:
    return [(a["attempt"], a["code"]) for a in status(Run.open(run))["attempts"]]


def story(run: str) -> str:
    """For a failed assertion: everything that jobs have said."""
    texts = [f"== {file}\n{file.read_text()}" for file in sorted(Path(run, "jobs").rglob("*.out"))]
    texts += [f"== {file}\n{file.read_text()[-3000:]}" for file in sorted(Path(run, "jobs").rglob("rank-*.log"))]
    return "\n".join(texts)


def ranks_of(job: str) -> dict[int, int]:
    """Process id of each rank of a job that trains."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"launchers.rank" in (process / "cmdline").read_bytes().split(b"\0"):
                environment = dict(e.split("=", 1) for e in (process / "environ").read_text().split("\0") if "=" in e)
                if environment.get("SLURM_JOB_ID") == job and "SLURM_PROCID" in environment:
                    found[int(environment["SLURM_PROCID"])] = int(process.name)
    return found


def running(slurm: Slurm) -> str | None:
    """The one job that runs, if one does."""
    found = [line.split()[0] for line in queue(slurm) if line.endswith("RUNNING")]
    assert len(found) < 2, "two live chains"
    return found[0] if found else None


def end_of(run: str, attempt: int) -> dict | None:
    file = Path(run, f"attempts/{attempt}/end.json")
    return json.loads(file.read_text()) if file.exists() else None


def reach_in_job(config, step: int, attempt: int) -> None:
    """Waits for an attempt to begin, and then until it has begun the step after ``step``."""
    wait(f"attempt {attempt}", Path(config.run, f"attempts/{attempt}/audit").exists)
    reach(config, step, attempt)


def test_a_chain_moves_from_two_nodes_to_four_to_one(slurm, fitv2, config_file, tiny, tmp_path):
    """Each job is asked to save as Slurm asks before a time limit, and goes on elsewhere."""
    options = {"train__steps": 150, "checkpoint__keep_last": 50, "checkpoint__every_steps": 100}
    run, file = str(tmp_path / "run"), config_file(**options)
    fitv2("submit", file, "--nodes", "2")
    moves = []
    for attempt, nodes in ((1, "4"), (2, "1")):
        job = wait("a job", lambda: running(slurm))
        fitv2("submit", file, "--nodes", nodes)  # while it starts
        reach_in_job(tiny(**options), 3 + (moves[-1] if moves else 0), attempt)
        assert sorted(line.split()[1] for line in queue(slurm)) == ["PENDING", "RUNNING"]
        slurm.run("scancel", "--signal=USR1", job)
        end = wait("its end", lambda number=attempt: end_of(run, number))
        assert end["code"] == 75 and end["reason"].startswith("SIGUSR1: saved at step"), story(run)
        moves.append(Run.open(run).log.commits()[-1].fields["step"])
        wait("it to go", lambda ended=job: running(slurm) != ended)
    wait_for_the_end(slurm)
    assert attempts(run) == [(1, 75), (2, 75), (3, 0)], story(run)
    assert [len(job["nodes"]) for job in jobs(Run.open(run))] == [2, 4, 1]

    undisturbed = tiny("undisturbed", **options)
    assert run_ranks(1, train, undisturbed) == [DONE]
    assert trained(run) == trained(undisturbed.run)
    assert losses(run) == pytest.approx(losses(undisturbed.run), rel=1e-3)
    for step in moves:  # one process that goes on from the same commit
        alone = tiny(f"alone{step}", **options | {"train__steps": step + 20})
        assert run_ranks(1, train, alone, f"{run}@{step}") == [DONE]
        expected = losses(alone.run)
        assert {s: losses(run)[s] for s in expected} == pytest.approx(expected, rel=1e-6)


def test_a_killed_rank_takes_its_step_down_and_the_next_job_avoids_its_node(slurm, fitv2, config_file, tiny):
    options = {"train__steps": 100, "checkpoint__every_steps": 10}
    config = tiny(**options)
    fitv2("submit", config_file(**options), "--nodes", "2")
    reach_in_job(config, 12, 1)
    job = running(slurm)
    ranks = ranks_of(job)
    assert sorted(ranks) == [0, 1]
    killed = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    wait("the step to go", lambda: not ranks_of(job), 30)
    gone = time.monotonic() - killed
    wait("attempt 2", Path(config.run, "attempts/2/audit").exists)
    first_step = time.monotonic() - killed
    wait_for_the_end(slurm)
    print(f"step gone after {gone:.1f} s, next attempt's first step after {first_step:.1f} s")
    assert gone < 15 and first_step < 150  # on a busy machine
    first, second = jobs(Run.open(config.run))
    assert first["blamed"] == [first["nodes"][1]] and first["nodes"][1] not in second["nodes"], story(config.run)
    assert len(second["nodes"]) == 2 and [code for _, code in attempts(config.run)][1] == 0
    undisturbed = tiny("undisturbed", **options)
    assert run_ranks(2, train, undisturbed) == [DONE] * 2
    assert trained(config.run) == trained(undisturbed.run)
    assert commit_bytes(config.run) == commit_bytes(undisturbed.run)


def test_a_time_limit_saves_and_stop_now_ends_it_all(slurm, fitv2, config_file, tiny):
    """Slurm looks at limits twice a minute: the signal may come while torch is still being imported."""
    options = {"train__steps": 100_000, "checkpoint__every_steps": 50_000}
    config = tiny(**options)
    limit = {"slurm__walltime": "1", "slurm__signal_seconds": 20}
    fitv2("submit", config_file(**options), "--nodes", "2", *(f"{k.replace('__', '.')}={v}" for k, v in limit.items()))
    end = wait("the time limit", lambda: end_of(config.run, 1))
    assert end["code"] == 75 and end["reason"].startswith("SIGUSR1: saved at step"), story(config.run)
    (commit,) = Run.open(config.run).log.commits()
    steps = Path(config.run, "attempts/1/audit/rank-00000.jsonl").read_text().splitlines()
    assert commit.fields["step"] == len(steps)  # nothing that was done is lost
    wait("the successor to train", Path(config.run, "attempts/2/audit").exists)
    said = fitv2("stop", config.run, "--now")
    assert "are killed" in said and "is cancelled" in said
    wait_for_the_end(slurm)
    end = end_of(config.run, 2)
    assert end is None or "without saving" in end["reason"], story(config.run)
    assert len(jobs(Run.open(config.run))) == 2 and len(Run.open(config.run).log.commits()) == 1


def test_save_and_stop(slurm, fitv2, config_file, tiny):
    options = {"train__steps": 100_000, "checkpoint__every_steps": 50_000}
    config = tiny(**options)
    fitv2("submit", config_file(**options), "--nodes", "2")
    reach_in_job(config, 3, 1)
    assert "attempt 1 commits at its next step" in fitv2("save", config.run)
    run = Run.open(config.run)
    wait("a commit", run.log.commits)
    assert end_of(config.run, 1) is None  # it goes on
    assert "1 was pending" not in fitv2("status", config.run)
    said = fitv2("stop", config.run)
    assert "STOP is in its log; the attempt that runs saves and ends" in said and "is cancelled" in said
    wait_for_the_end(slurm)
    (attempt,) = status(run)["attempts"]
    assert attempt["code"] == 75 and attempt["why"].startswith("STOP: saved at step"), story(config.run)
    assert len(run.log.commits()) == 2 and len(jobs(run)) == 1
    assert "there is nothing to save" in fitv2("save", config.run, code=2)
    assert "attempt 1 begins with 2 ranks" in fitv2("logs", config.run)
    assert "task 1 on node" in fitv2("logs", config.run, "--rank", "1")


def test_a_stopped_rank_is_named_and_its_node_avoided(slurm, fitv2, config_file, tiny):
    options = {"train__steps": 100, "checkpoint__every_steps": 5, "watchdog__step_seconds": 15.0}
    config = tiny(**options)
    fitv2("submit", config_file(**options), "--nodes", "3")
    reach_in_job(config, 8, 1)
    job = running(slurm)
    time.sleep(2)  # in its first steps it may be silent for longer
    os.kill(ranks_of(job)[1], signal.SIGSTOP)
    end = wait("the watchdog", lambda: end_of(config.run, 1))
    assert end["code"] == 75 and end["reason"].startswith("rank 1 on node2 has not been heard of for"), story(
        config.run
    )
    wait_for_the_end(slurm)
    first, second = jobs(Run.open(config.run))
    assert first["blamed"] == ["node2"] and second["nodes"] == ["node1", "node3", "node4"], story(config.run)
    assert attempts(config.run) == [(1, 75), (2, 0)]


def test_a_lost_node_costs_one_attempt_and_cannot_commit(slurm, fitv2, config_file, tiny):
    """The node with the batch script dies to Slurm; its processes live on, and are shut out by the log."""
    options = {"train__steps": 100_000, "checkpoint__every_steps": 5}
    config = tiny(**options)
    fitv2("submit", config_file(**options), "--nodes", "2")
    reach_in_job(config, 8, 1)
    job = running(slurm)
    slurm.kill("node1")
    try:
        wait("another job", lambda: running(slurm) not in (None, job), 300)
        reach_in_job(config, 8, 2)
        entries = Run.open(config.run).log.entries()
        claimed = next(e.n for e in entries if e.kind == "CLAIM" and e.attempt == 2)
        assert all(e.attempt == 2 for e in entries if e.n > claimed and e.kind == "COMMIT")
        fitv2("stop", config.run)
        wait_for_the_end(slurm)
        assert "node1" not in jobs(Run.open(config.run))[1]["nodes"]
        assert end_of(config.run, 2)["reason"].startswith("STOP: saved"), story(config.run)
    finally:
        slurm.start_node("node1")


def test_a_crash_loop_ends_after_three_jobs(slurm, fitv2, config_file, tmp_path):
    events = tmp_path / "events"
    wrap = f"{sys.executable} {Path(__file__).with_name('faulty_rank.py')} step:3"
    command = tmp_path / "tell"
    command.write_text(f'#!/bin/sh\necho "$1|$2|$3" >>{events}\n')
    command.chmod(0o755)
    fitv2("submit", config_file(), f"slurm.wrap={wrap}", f"slurm.on_event={command}")
    wait_for_the_end(slurm)
    run = str(tmp_path / "run")
    assert attempts(run) == [(1, 1), (2, 1), (3, 1)], story(run)
    assert [job["code"] for job in jobs(Run.open(run))] == [1, 1, 1]
    event, url, reason = events.read_text().strip().split("|")
    assert (event, url) == ("gave-up", run)
    assert reason.startswith("3 jobs in a row ended without a new commit") and "planned failure at step 3" in reason
    assert "planned failure" in fitv2("logs", run)
    assert "chain: gave-up  3 jobs in a row ended without a new commit" in fitv2("status", run)


def test_what_dies_before_an_attempt_ends_after_three_jobs(slurm, fitv2, config_file, tmp_path):
    fitv2("submit", config_file(), "slurm.wrap=/bin/false")
    wait_for_the_end(slurm)
    run = Run.open(str(tmp_path / "run"))
    assert [(job["code"], job["reason"]) for job in jobs(run)] == [
        (75, "died before it could begin an attempt (exit code 1)")
    ] * 3, story(run.url)
    assert run.log.entries() == []
    last = jobs(run)[-1]["job"]
    assert "ExitCode=93:0" in slurm.run("scontrol", "show", "job", last)
    # A person who has mended it submits again, and the count begins anew.
    fitv2("submit", config_file(), "slurm.wrap=''")
    wait_for_the_end(slurm)
    assert attempts(run.url) == [(1, 0)], story(run.url)


def test_a_node_that_always_fails_is_avoided(slurm, fitv2, config_file, tmp_path):
    wrap = f"{sys.executable} {Path(__file__).with_name('faulty_rank.py')} node:node1"
    fitv2("submit", config_file(), "--nodes", "2", f"slurm.wrap={wrap}")
    wait_for_the_end(slurm)
    run = str(tmp_path / "run")
    first, second = jobs(Run.open(run))
    assert (first["nodes"], first["blamed"]) == (["node1", "node2"], ["node1"]), story(run)
    assert second["nodes"] == ["node2", "node3"] and second["code"] == 0, story(run)


@pytest.mark.parametrize(
    "words,said",
    [
        (["slurm.partition=gpu"], "slurm.partition=gpu: this cluster has test."),
        (["--nodes", "9"], "sbatch refuses: .*(node|Node)"),
        (["slurm.extra=[--no-such-option]"], "sbatch refuses: .*no-such-option"),
        (["data.url=/no/such/set"], "there is no dataset at /no/such/set"),
        (["train.stepps=3"], "unknown key train.stepps, did you mean train.steps?"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_queued(slurm, fitv2, config_file, tmp_path, words, said):
    error = fitv2("submit", config_file(), *words, code=2)
    assert re.search(said, error) and error.count("fitv2: ") == 1, error
    assert not (tmp_path / "run").exists() and queue(slurm) == []


def test_a_secret_goes_along_and_is_written_nowhere(slurm, fitv2, config_file, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    uri = "http://me:hunter2@127.0.0.1:9"
    shown = fitv2("submit", config_file(), f"tracking.uri={uri}", "--dry-run")
    shown += fitv2("submit", config_file(), f"tracking.uri={uri}")
    wait_for_the_end(slurm)
    run = str(tmp_path / "run")
    assert attempts(run) == [(1, 0)], story(run)
    shown += fitv2("status", run) + fitv2("logs", run)
    assert "hunter2" not in shown
    files = [file for file in Path(run).rglob("*") if file.is_file()]
    assert any(file.name == "uploader.log" for file in files)
    assert [file for file in files if b"hunter2" in file.read_bytes()] == []
    # What ran was the copy of the code, though the job began in this folder, which has the packages too.
    assert list(Path(run).glob("jobs/*/code/fitv2_scale/__pycache__/train.*.pyc"))


def test_another_command_as_a_job(slurm, fitv2, dataset, config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitv2("submit", config_file(), "--nodes", "2", "slurm.folder=jobs", "--", "shard", "verify", dataset)
    wait_for_the_end(slurm)
    (output,) = Path("jobs").glob("*/job-*.out")
    assert output.read_text().count("all is well") == 2


def test_a_sweep_is_a_chain_for_each_combination(slurm, fitv2, config_file, tmp_path):
    run = tmp_path / "sweep"
    fitv2("submit", config_file(train__steps=3), f"run={run}", "--sweep", "model.depth=1,2,3")
    wait_for_the_end(slurm)
    assert {p.name for p in run.iterdir()} == {"depth-1", "depth-2", "depth-3"}
    for depth in (1, 2, 3):
        folder = str(run / f"depth-{depth}")
        assert attempts(folder) == [(1, 0)], story(folder)
        assert Run.open(folder).config["model"]["depth"] == depth
