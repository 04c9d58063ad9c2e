"""However training is started, and whatever asks it to end: the steps that it did are saved, and no process is left.

The whole matrix is long; the short suite has the ways that a signal takes, each once.
"""

import signal

import pytest

from tests.support.launched_training import (
    assert_saved,
    continues_when_nobody_reads_it,
    saves_when_its_terminal_closes,
    training,
)
from tests.support.run_history import reach

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
    saves_when_its_terminal_closes(launcher, tiny(**ENDLESS))


@pytest.mark.services
@pytest.mark.parametrize(
    "launcher", ["plain", *(pytest.param(name, marks=pytest.mark.long) for name in ("torchrun", "supervise"))]
)
def test_a_pipe_that_nobody_reads_any_more(tiny, launcher):
    continues_when_nobody_reads_it(launcher, tiny(**ENDLESS | {"train__steps": 60}))
