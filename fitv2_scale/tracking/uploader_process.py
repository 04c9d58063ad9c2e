"""Training's side of the uploader: starts the process, and restarts it when it was killed. Never imports mlflow."""

import logging
import os
import subprocess
import sys
import time

from fitv2_scale.run.run import Run
from fitv2_scale.tracking.destination import URI_VARIABLE, resolve_uri
from fitv2_scale.tracking.uploader_state import TroubleReader

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 600.0
log = logging.getLogger(__name__)


class Uploader:
    """An uploader process that follows this one. Create it on rank 0, after ``Run.claim``. Raises UserError.

    It outlives this process until everything committed is published, and exits by itself. Where the end of a job kills
    all its processes (Slurm), wait for it for a bounded time after ``Attempt.end``; `fitv2 track sync` publishes the
    rest.
    """

    def __init__(self, run_url: str, uri: str, experiment: str) -> None:
        run = Run.open(run_url)
        self._log = run.local_path("tracking/uploader.log")
        self._trouble = TroubleReader(run)
        self._command = [sys.executable, "-m", "fitv2_scale.tracking.uploader", run.url]
        self._command += ["--experiment", experiment, "--follow", str(os.getpid())]
        # In the environment, since every user of the machine can read a command line.
        self._environment = os.environ | {URI_VARIABLE: resolve_uri(run_url, uri)}
        self._pause = _FIRST_PAUSE_S
        self._started = time.monotonic()
        self.process = self._start()

    def check(self) -> list[str]:
        """Restarts it if it has died, after a pause that doubles each time. Returns what the user should be told: that
        nothing can be published, and what to do. Cheap: for the step loop."""
        code = self.process.poll() if self.process else "it could not be started"
        if code not in (None, 0) and time.monotonic() - self._started >= self._pause:
            log.warning("the uploader died (%s) and is restarted; see %s", code, self._log)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
            self._started = time.monotonic()
            self.process = self._start()
        return self._trouble.news()

    def _start(self) -> subprocess.Popen[bytes] | None:
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with open(self._log, "ab") as out:
                # A session of its own: a Ctrl-C or a SIGUSR1 to training's process group is not meant for the uploader.
                return subprocess.Popen(
                    self._command,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
        except OSError as error:  # a full disk, no more processes: `fitv2 track sync` can publish the journal later
            log.warning("the uploader cannot be started: %s", error)
            return None
