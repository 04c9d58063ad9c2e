"""Training as a user starts it: plain, by torchrun, under a supervisor, by srun; and a pipe or terminal that goes.

What ends it is sent to the process that the user has started.
"""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from fitv2_scale.config.schema import Config
from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from tests.support.run_history import audited, reach
from tests.support.waiting import wait

_PYTHON = [sys.executable, "-m"]
LAUNCHERS = {
    "plain": ([], []),
    "torchrun": (["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"], []),
    "supervise": ([], ["--supervise", "--processes", "2"]),
    "srun": (["srun", "-N2", "-n2"], []),
}


def command_of(launcher: str, file: Path) -> list[str]:
    before, behind = LAUNCHERS[launcher]
    if launcher == "srun":
        return [*before, *_PYTHON, "fitv2_scale.cli", "train", str(file)]
    return [*_PYTHON, *before, "fitv2_scale.cli", "train", str(file), *behind]


@contextmanager
def training(launcher: str, config: Config, before: Sequence[str] = (), **options) -> Generator[subprocess.Popen]:
    """Starts it behind the words ``before``, in a session of its own; kills at the end what is left of it."""
    file = Path(config.run + ".yaml")
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    # As a shell starts it: a suite that runs under nohup would pass on that SIGHUP is ignored.
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen([*before, *command_of(launcher, file)], start_new_session=True, **options)
    signal.signal(signal.SIGHUP, handler)
    try:
        yield process
    finally:
        for pid in [process.pid, *processes_of(config)]:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        process.wait()


def processes_of(config: Config) -> list[int]:
    """All of this machine that train this run, or start it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{config.run}.yaml" in (process / "cmdline").read_text(errors="replace").split("\0"):
                found.append(int(process.name))
    return [pid for pid in found if pid != os.getpid()]


@contextmanager
def on_a_terminal(launcher: str, config: Config, before: Sequence[str] = ()) -> Generator[tuple[subprocess.Popen, int]]:
    """As ``training``, with a terminal of its own: gives also its far end, which closes the terminal when it closes."""
    far, near = pty.openpty()
    control = lambda: fcntl.ioctl(near, termios.TIOCSCTTY, 0)  # noqa: E731 - in the child, which leads its session
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), near)
    try:
        with training(launcher, config, before, **streams, preexec_fn=control) as process:
            os.close(near)
            yield process, far
    finally:
        with suppress(OSError):
            os.close(far)


def assert_saved(config: Config, why: str, attempt: int = 1) -> None:
    """It has ended; every step that it did is in its last commit; and no process is left."""
    wait("its processes to end", lambda: not processes_of(config))
    run = Run.open(config.run)
    (*_, last), commits = status(run)["attempts"], run.log.commits()
    assert last["code"] == 75 and last["why"].startswith(f"{why}: saved at step"), last
    assert commits[-1].fields["step"] == audited(config.run, attempt)[-1] + 1


def saves_when_its_terminal_closes(launcher: str, config: Config) -> None:
    """Everything that it would print fails at the same time."""
    with on_a_terminal(launcher, config) as (process, far):
        reach(config.run, 3, 1)
        os.close(far)
        process.wait(120)
        assert_saved(config, "SIGHUP")


def continues_when_nobody_reads_it(launcher: str, config: Config) -> None:
    """As of `fitv2 train … 2>&1 | head -1`: training continues to its end, and its exit code is its own."""
    with training(launcher, config, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(300) == 0
        wait("its processes to end", lambda: not processes_of(config))
    (attempt,) = status(Run.open(config.run))["attempts"]
    assert (attempt["why"], attempt["code"]) == (f"all {config.train.steps} steps are done", 0), attempt
