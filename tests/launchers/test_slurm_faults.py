"""What goes wrong in a job, on a real Slurm, and what becomes of the chain."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from fitv2_scale.config.schema import Config
from fitv2_scale.run.run import Run
from fitv2_scale.train.loop import DONE, train
from launchers.control import jobs
from tests.support.commits import commit_bytes
from tests.support.kill_storm import check_storm
from tests.support.rank_processes import ranks_of_job
from tests.support.ranks import run_ranks
from tests.support.repository import ROOT
from tests.support.run_history import audited, reach, trained
from tests.support.slurm_jobs import attempts, end_of, running, story, wait_for_the_end
from tests.support.waiting import wait

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


PATIENT = [f"watchdog__{section}_seconds" for section in ("compile", "load", "save")]  # half an hour, by default


def wrap(fault: str) -> str:
    return f"slurm.wrap={sys.executable} {ROOT / 'tests/support/faulty_rank.py'} {fault}"


def begun(slurm, fitv2, job_config, tiny, step: int, **options) -> tuple[Config, str]:
    """A run on two nodes that has begun the step after ``step``, and its job."""
    config = tiny(**options)
    fitv2("submit", job_config(**options), "--nodes", "2")
    reach(config.run, step, 1)
    return config, running(slurm)


def test_a_killed_rank_takes_its_step_down_and_the_next_job_avoids_its_node(slurm, fitv2, job_config, tiny):
    options = {"train__steps": 100, "checkpoint__every_steps": 10}
    config, job = begun(slurm, fitv2, job_config, tiny, 0, **options)
    ranks = ranks_of_job(job)
    assert sorted(ranks) == [0, 1]
    reach(config.run, 12, 1)
    killed = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    wait("the step to go", lambda: not ranks_of_job(job))
    gone = time.monotonic() - killed
    wait("attempt 2", lambda: audited(config.run, 2))
    first_step = time.monotonic() - killed
    wait_for_the_end(slurm)
    print(f"step gone after {gone:.1f} s, next attempt's first step after {first_step:.1f} s")
    first, second = jobs(Run.open(config.run))
    assert first["blamed"] == [first["nodes"][1]] and first["nodes"][1] not in second["nodes"], story(config.run)
    assert len(second["nodes"]) == 2 and [code for _, code in attempts(config.run)][1] == 0
    undisturbed = tiny("undisturbed", **options)
    assert run_ranks(2, train, undisturbed) == [DONE] * 2
    assert trained(config.run) == trained(undisturbed.run)
    assert commit_bytes(config.run) == commit_bytes(undisturbed.run)


@pytest.mark.long
def test_how_soon_a_killed_rank_is_forgotten(slurm, fitv2, job_config, tiny):
    """Seconds, on a quiet machine: the step is gone within 5, the next attempt's first step is there within 60."""
    config = tiny(train__steps=100_000)
    fitv2("submit", job_config(train__steps=100_000), "--nodes", "2")
    for attempt in (1, 2, 3):
        reach(config.run, 30 * attempt, attempt)
        job = running(slurm)
        killed = time.monotonic()
        os.kill(ranks_of_job(job)[attempt % 2], signal.SIGKILL)
        wait("the step to go", lambda ended=job: not ranks_of_job(ended))
        gone = time.monotonic() - killed
        wait("the next attempt", lambda following=attempt + 1: audited(config.run, following))
        first_step = time.monotonic() - killed
        print(f"step gone after {gone:.1f} s, next attempt's first step after {first_step:.1f} s")
        assert gone < 5 and first_step < 60


def test_a_lost_node_costs_one_attempt_and_cannot_commit(slurm, fitv2, job_config, tiny):
    """The node with the batch script dies to Slurm; its processes live on, and are shut out by the log."""
    options = {"train__steps": 100_000, "checkpoint__every_steps": 5}
    config, job = begun(slurm, fitv2, job_config, tiny, 8, **options)
    slurm.kill("node1")
    try:
        wait("another job", lambda: running(slurm) not in (None, job))
        wait("attempt 2", lambda: audited(config.run, 2))
        reach(config.run, audited(config.run, 2)[0] + 8, 2)
        entries = Run.open(config.run).log.entries()
        claimed = next(e.n for e in entries if e.kind == "CLAIM" and e.attempt == 2)
        assert all(e.attempt == 2 for e in entries if e.n > claimed and e.kind == "COMMIT")
        fitv2("stop", config.run)
        wait_for_the_end(slurm)
        assert "node1" not in jobs(Run.open(config.run))[1]["nodes"]
        assert end_of(config.run, 2)["reason"].startswith("STOP: saved"), story(config.run)
        assert [attempt for attempt, _ in attempts(config.run)] == [1, 2]
    finally:
        slurm.start_node("node1")


def test_a_stopped_rank_is_named_and_its_node_avoided(slurm, fitv2, job_config, tiny, tmp_path):
    limits = {"watchdog__step_seconds": 15.0} | dict.fromkeys(PATIENT, 60.0)
    options = {"train__steps": 100_000, "checkpoint__every_steps": 50_000, **limits}
    config, events = tiny(**options), tmp_path / "events"
    fitv2("submit", job_config(**options), "--nodes", "3", f"slurm.on_event=printf '%s|%s|%s\\n' >>{events}")
    reach(config.run, 8, 1)
    job = running(slurm)
    time.sleep(2)  # what it says in its first steps is that it may be silent for longer
    os.kill(ranks_of_job(job)[1], signal.SIGSTOP)
    end = wait("the watchdog", lambda: end_of(config.run, 1))
    reach(config.run, 0, 2)
    fitv2("stop", config.run)
    said = "rank 1 on node2 has not been heard from for"
    assert end["code"] == 75 and end["reason"].startswith(said), story(config.run)
    wait_for_the_end(slurm)
    first, second = jobs(Run.open(config.run))
    assert first["blamed"] == ["node2"] and second["nodes"] == ["node1", "node3", "node4"], story(config.run)
    assert attempts(config.run) == [(1, 75), (2, 75)]
    hung, stopped = events.read_text().splitlines()
    assert hung.startswith(f"hung|{config.run}|{said}") and stopped == f"stopped|{config.run}|fitv2 stop"


def test_crash_loops_end_after_three_jobs(slurm, fitv2, job_config, tmp_path):
    """One that fails at step 3 every time, and one that dies before it can start an attempt; side by side."""
    events, late, early = tmp_path / "events", str(tmp_path / "late"), str(tmp_path / "early")
    command = tmp_path / "tell"
    command.write_text(f'#!/bin/sh\necho "$1|$2|$3" >>{events}\n')
    command.chmod(0o755)
    fitv2("submit", job_config("late"), wrap("step:3"), f"slurm.on_event={command}")
    fitv2("submit", job_config("early"), "slurm.wrap=/bin/false")
    wait_for_the_end(slurm)

    assert attempts(late) == [(1, 1), (2, 1), (3, 1)], story(late)
    assert [job["code"] for job in jobs(Run.open(late))] == [1, 1, 1]
    event, url, reason = events.read_text().strip().split("|")
    assert (event, url) == ("no-progress", late)
    assert reason.startswith("3 jobs in a row ended without a new commit") and "planned failure at step 3" in reason
    assert "planned failure" in fitv2("logs", late)
    assert "chain: no-progress  3 jobs in a row ended without a new commit" in fitv2("status", late)

    run = Run.open(early)
    assert [(job["code"], job["reason"]) for job in jobs(run)] == [
        (75, "failed before an attempt started (exit code 1)")
    ] * 3, story(run.url)
    assert run.log.entries() == []
    for folder in (early, late):
        assert "ExitCode=93:0" in slurm.run("scontrol", "show", "job", jobs(Run.open(folder))[-1]["job"])
    # A person who has mended it submits again, and the count starts at zero.
    fitv2("submit", job_config("early"))
    wait_for_the_end(slurm)
    assert attempts(early) == [(1, 0)], story(early)


def test_a_signal_before_there_are_ranks_costs_one_job(slurm, fitv2, job_config, tmp_path):
    """USR1 reaches the first batch script before it has done anything, TERM the second."""
    tell = "for s in USR1 TERM; do [ -e $home/$s ] || { touch $home/$s; kill -s $s $$; break; }; done"
    fitv2("submit", job_config(slurm__setup=[tell]))
    wait_for_the_end(slurm)
    run = str(tmp_path / "run")
    assert [(job["code"], job["reason"], job["blamed"]) for job in jobs(Run.open(run))] == [
        (75, "SIGUSR1 came before its ranks were started", []),
        (75, "SIGTERM came before its ranks were started", []),
        (0, "all 6 steps are done", []),
    ], story(run)
    assert attempts(run) == [(1, 0)], story(run)


def test_a_node_that_is_not_fit_is_avoided(slurm, fitv2, job_config, tmp_path):
    """Its rank is found unfit when the job examines its nodes; the others are well and are not blamed."""
    fitv2("submit", job_config(slurm__doctor=True), "--nodes", "2", wrap("unfit:node1"))
    wait_for_the_end(slurm)
    run = str(tmp_path / "run")
    first, second = jobs(Run.open(run))
    assert (first["nodes"], first["blamed"]) == (["node1", "node2"], ["node1"]), story(run)
    assert second["nodes"] == ["node2", "node3"] and second["code"] == 0, story(run)
    assert attempts(run) == [(1, 0)]
    (log,) = Path(run).glob("jobs/*/rank-0.log")
    assert "FAULT  temporary folder" in log.read_text()


@pytest.mark.long
@pytest.mark.timeout(4000)
def test_a_storm(slurm, fitv2, job_config, tiny):
    """A random rank is killed every minute for fifteen minutes."""
    options = {"train__steps": 1_000_000, "checkpoint__every_steps": 50, "slurm__exclude_minutes": 0.0}
    config, rng, restarts = tiny(**options), random.Random(0), []
    fitv2("submit", job_config(**options, slurm__walltime="60"), "--nodes", "2")
    wait("its first step", lambda: audited(config.run, 1))
    began, attempt = time.monotonic(), 1
    while time.monotonic() < began + 15 * 60:
        time.sleep(60)  # the storm's own pace
        job = running(slurm)
        hit = time.monotonic()
        os.kill(rng.choice(list(ranks_of_job(job).values())), signal.SIGKILL)
        attempt += 1
        wait(f"attempt {attempt}", lambda following=attempt: audited(config.run, following))
        restarts.append(time.monotonic() - hit)
    fitv2("stop", config.run)
    wait_for_the_end(slurm)
    *killed, last = [code for _, code in attempts(config.run)]
    assert len(killed) == attempt - 1 and last == 75, story(config.run)
    assert set(killed) <= {None, 75}  # the one that is left may get to say that it has lost the other
    print(f"{len(restarts)} kills, restarts took {min(restarts):.1f} to {max(restarts):.1f} s")
    check_storm(config.run, tiny, 2)
