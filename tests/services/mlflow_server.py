"""A real MLflow tracking server on loopback, on SQLite, that can be stopped and started again on the same port."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from tests.services.ports import free_port


class MlflowServer:
    """``uri`` is its tracking URI, ``db`` its database."""

    def __init__(self, folder: Path):
        self.folder, self.db = folder, folder / "mlflow.db"
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Answers some seconds later. Nothing happens if it runs."""
        if self._process is not None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.db}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command, env=os.environ | quiet, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, seconds: float = 300.0) -> None:
        """Until it answers."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                assert time.monotonic() < deadline and self._process.poll() is None, (
                    self.folder / "server.log"
                ).read_text()
                time.sleep(0.1)

    def pause(self) -> None:
        """It is there, and does not answer."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def keep_to(self, cores: set[int]) -> None:
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(ProcessLookupError):
                if os.getpgid(int(process.name)) == self._process.pid:
                    os.sched_setaffinity(int(process.name), cores)

    def stop(self) -> None:
        """As a crash would, with all that it started."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def started_mlflow(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def mlflow_server(started_mlflow) -> MlflowServer:
    """One for all tests of a session. It has been started, but not waited for: that takes it ten seconds."""
    started_mlflow.start()
    return started_mlflow
