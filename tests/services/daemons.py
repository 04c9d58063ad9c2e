"""What test servers made of daemons share: all they have lies in one folder, and nothing outlives the test run."""

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Self

import pytest

PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


class Daemons:
    """A context manager. A subclass names the programs it needs, and starts them in ``_start``."""

    NAME = ""  # of the server
    NEEDS: tuple[str, ...] = ()  # programs

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen] = {}

    @classmethod
    def missing(cls) -> list[str]:
        """What the server would need and this machine lacks."""
        return [name for name in ("setpriv", *cls.NEEDS) if shutil.which(name, path=PATH) is None]

    @classmethod
    def or_skip(cls, folder: Path) -> Self:
        """A server, not started yet; where something is missing, the test is skipped."""
        if absent := cls.missing():
            pytest.skip(f"no {cls.NAME}: {', '.join(absent)} missing (as root, tests/run.sh installs the servers)")
        return cls(folder)

    @property
    def environment(self) -> dict[str, str]:
        """What a client of the server needs."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc) -> None:
        for name in reversed(list(self._daemons)):
            self.kill(name)

    def run(self, *command: str, timeout: float = 60) -> str:
        """Runs one of the server's programs; returns its output."""
        environment = os.environ | self.environment | {"PATH": PATH}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout

    def kill(self, name: str) -> None:
        """SIGKILL to a daemon, whatever it holds."""
        daemon = self._daemons.pop(name)
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()

    def _start(self) -> None:
        raise NotImplementedError

    def _daemon(self, name: str, program: str, *arguments: str) -> None:
        """In the foreground, and killed by the kernel with its parent. It prints to ``name``.out in the folder."""
        command = ("setpriv", "--pdeathsig", "KILL", program, *arguments)
        with open(self.folder / f"{name}.out", "ab") as output:
            environment = os.environ | {"PATH": PATH}
            self._daemons[name] = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
