"""However training is started, and whatever asks it to end: the steps that it did are saved, and no process is left.

The whole matrix is long; the short suite has the ways that a signal takes, each once.
"""

import os
import signal
import subprocess

import pytest

from tests.support.launched_training import assert_saved, on_a_terminal, processes_of, training
from tests.support.run_history import reach
from tests.support.waiting import wait

SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ENDLESS = {"train__steps": 100_000, "checkpoint__every_steps": 50_000}


def is_saved_after(config, launcher: str, number: int) -> None:
    with training(launcher, config) as process:
        reach(config.run, 3, 1)
        process.send_signal(number)
        code = process.wait(120)
        # torchrun dies of SIGUSR1; its ranks notice. It and srun give codes of their own.
        assert code == 75 or launcher in ("torchrun", "srun")
        assert_saved(config, "the launcher died" if (launcher, number) == ("torchrun", 10) else number.name)


@pytest.mark.services
@pytest.mark.parametrize("launcher,number", [("plain", signal.SIGHUP), ("torchrun", signal.SIGHUP)])
def test_a_signal_saves(tiny, launcher, number):
    is_saved_after(tiny(**ENDLESS), launcher, number)


@pytest.mark.long
@pytest.mark.services
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("launcher", ["plain", "torchrun", "supervise"])
def test_every_signal_saves(tiny, launcher, number):
    is_saved_after(tiny(**ENDLESS), launcher, number)


@pytest.mark.services
@pytest.mark.parametrize(
    "launcher", ["plain", *(pytest.param(name, marks=pytest.mark.long) for name in ("torchrun", "supervise"))]
)
def test_a_terminal_that_closes(tiny, launcher):
    """Everything that it would print fails at the same time."""
    config = tiny(**ENDLESS)
    with on_a_terminal(launcher, config) as (process, far):
        reach(config.run, 3, 1)
        os.close(far)
        process.wait(120)
        assert_saved(config, "SIGHUP")


@pytest.mark.services
@pytest.mark.parametrize(
    "launcher", ["plain", *(pytest.param(name, marks=pytest.mark.long) for name in ("torchrun", "supervise"))]
)
def test_a_pipe_that_nobody_reads_any_more(tiny, launcher):
    """As of `fitv2 train … 2>&1 | head -1`: training continues, and its exit code is its own."""
    config = tiny(**ENDLESS | {"train__steps": 60})
    with training(launcher, config, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(300) == 0
        wait("its processes to end", lambda: not processes_of(config))
