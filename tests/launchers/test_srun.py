"""`srun fitv2 train`, without `fitv2 submit`: the tasks of a step are the ranks of one attempt."""

import os
import signal

import pytest

from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from tests.support.launched_training import (
    assert_saved,
    continues_when_nobody_reads_it,
    on_a_terminal,
    processes_of,
    training,
)
from tests.support.run_history import reach
from tests.support.waiting import wait

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


LATER = [pytest.param(number, marks=pytest.mark.long) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]


@pytest.mark.parametrize("number", [signal.SIGHUP, *LATER])
def test_the_tasks_of_a_step_are_the_ranks_of_one_attempt_and_save(slurm, tiny, number):
    """`scancel` signals the tasks; srun itself would kill them on SIGTERM."""
    config = tiny(train__steps=100_000, checkpoint__every_steps=50_000)
    with training("srun", config) as process:
        reach(config.run, 3, 1)
        (job,) = slurm.run("squeue", "--noheader", "--format=%i").split()
        slurm.run("scancel", f"--signal={number.name.removeprefix('SIG')}", job)
        process.wait(120)
        assert_saved(config, number.name)
    (attempt,) = status(Run.open(config.run))["attempts"]
    assert attempt["code"] == 75
    assert sorted(p.name for p in Run.open(config.run).local_path("attempts/1/audit").iterdir()) == [
        "rank-00000.jsonl",
        "rank-00001.jsonl",
    ]


@pytest.mark.long
def test_a_terminal_that_closes(slurm, tiny):
    """srun kills its tasks; what rank 0 says in the beginning keeps it apart from the terminal."""
    ending = tiny(train__steps=60, checkpoint__every_steps=50_000)
    with on_a_terminal("srun", ending, ["setsid", "--wait"]) as (process, far):
        reach(ending.run, 3, 1)
        assert "start it in tmux or with setsid" in os.read(far, 1 << 16).decode()
        os.close(far)
        wait("its processes to end", lambda: not processes_of(ending))
    (attempt,) = status(Run.open(ending.run))["attempts"]
    assert (attempt["why"], attempt["code"]) == ("all 60 steps are done", 0), attempt


@pytest.mark.long
def test_a_pipe_that_nobody_reads_any_more(slurm, tiny):
    continues_when_nobody_reads_it("srun", tiny(train__steps=60, checkpoint__every_steps=50_000))
