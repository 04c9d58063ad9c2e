"""The process that publishes a run to MLflow: training never waits for a server and never imports mlflow.

    python -m fitv2_scale.tracking.uploader RUN --experiment NAME [--uri URI] [--follow PID]

Rank 0 starts one that follows it; `fitv2 track sync RUN` publishes once. Only what COMMITs vouch for is published, with
the times at which it was measured (see ``journal``). An outage of MLflow costs waiting here, and one line each time in
tracking/uploader.log of the run folder:

    2025-06-01T12:00:00.000000+00:00 waiting 4 s for MLflow: MlflowException: …

tracking/lock is held (flock) by the one uploader that publishes. Log and lock of a run on S3 are the node's (see
``scratch``): two nodes may publish it at the same time, which sends some points twice, as after a kill.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_sharding.errors import StorageDown, UserError
from fitv2_scale.redact import redact
from fitv2_scale.run import Attempt, Run
from fitv2_scale.run_log import newest_attempt, now
from fitv2_scale.store import LocalStore, open_store

_URI_VARIABLE = "MLFLOW_TRACKING_URI"


@dataclass(frozen=True)
class Patience:
    """How long the uploader waits for things, in seconds."""

    poll: float = 1.0  # between two looks at the run
    backoff: float = 1.0  # after a first error; doubles with each in a row
    backoff_most: float = 60.0
    last_pass: float = 120.0  # for MLflow, or for another uploader, once training has ended


def resolve_uri(run_url: str, uri: str) -> str:
    """The tracking URI that ``uri`` means: "auto" is one SQLite file for all the runs that lie side by side.

    Raises UserError if they do not lie on a disk.
    """
    if uri != "auto":
        return uri
    store = open_store(run_url)
    if not isinstance(store, LocalStore):
        raise UserError(f"{run_url}: beside a run on S3 there can be no MLflow file; give its URI.")
    return f"sqlite:///{Path(store.url).parent / 'mlflow.db'}"


def start_uploader(run_url: str, uri: str, experiment: str) -> subprocess.Popen[bytes]:
    """Starts an uploader that follows this process. Call on rank 0, after ``Run.claim``.

    It outlives this process until everything committed is published, and exits by itself. Where a job's end kills all
    its processes (Slurm), wait for it a bounded while after ``Attempt.end``; what is left, `fitv2 track sync` brings.
    """
    run = Run.open(run_url)
    log = run.local("tracking/uploader.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "fitv2_scale.tracking.uploader", run.url]
    command += ["--experiment", experiment, "--follow", str(os.getpid())]
    environment = os.environ | {_URI_VARIABLE: resolve_uri(run_url, uri)}  # a command line shows passwords to everybody
    with open(log, "ab") as out:
        # A session of its own: a Ctrl-C or a SIGUSR1 to training's process group is not meant for the uploader.
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )


def sync(run_url: str, uri: str, experiment: str, patience: Patience = Patience()) -> dict[str, Any]:  # noqa: B008
    """Publishes everything committed, once, from anywhere.

    Returns {"metrics": 1200, "pictures": 3, "missing": 0, "mlflow_run": "8d0f…", "uri": "sqlite:////runs/mlflow.db"}.
    Raises UserError if there is no such run, if MLflow does not take it, or while training's own uploader is at it.
    A run without end.json becomes KILLED: training would have an uploader, which would hold the lock. On S3, where that
    may be on another node, its status stays.
    """
    # Not at the top: the trainer imports this module to start the uploader, and must never load mlflow.
    from fitv2_scale.tracking.publisher import Publisher, ServerError

    run, uri = Run.open(run_url), resolve_uri(run_url, uri)
    with _Lock(run) as lock:
        deadline = time.monotonic() + patience.last_pass
        while not lock.held():
            if not _attempt_has_ended(run) or time.monotonic() > deadline:
                raise UserError(f"{run.url} is being published by another uploader; leave it to that one.")
            time.sleep(patience.poll)
        try:
            publisher = Publisher(run, uri, experiment)
            counts = publisher.publish()
            if isinstance(run.store, LocalStore) or _attempt_has_ended(run):
                publisher.finish()
        except ServerError as error:
            raise UserError(
                f"MLflow at {redact(uri)} does not take the journal of {run.url} ({error}); nothing is lost, "
                "so run `fitv2 track sync` again when it is back."
            ) from error
    return counts | {"mlflow_run": publisher.mlflow_run, "uri": redact(uri)}


def follow(run: Run, uri: str, experiment: str, pid: int, patience: Patience = Patience()) -> None:  # noqa: B008
    """Publishes as COMMITs come, until process ``pid`` is gone or the newest attempt has ended; then what is left.

    While MLflow fails, it waits and tries again. If that lasts after training has ended, the rest is left to ``sync``.
    """
    from fitv2_scale.tracking.publisher import Publisher, ServerError

    publisher, deadline, backoff = None, None, patience.backoff
    alive = _Process(pid)

    def ended_on_record() -> bool:
        try:
            return _attempt_has_ended(run)
        except StorageDown:
            return False

    with _Lock(run) as lock:
        while True:
            # Asked before the pass, so that the pass after the end sees all that was committed.
            ended = not alive() or ended_on_record()
            if ended and deadline is None:
                deadline = time.monotonic() + patience.last_pass
            pause = patience.poll
            if lock.held():
                try:
                    publisher = publisher or Publisher(run, uri, experiment)
                    publisher.publish()
                    if ended:
                        publisher.finish()
                        return
                    backoff = patience.backoff
                except (ServerError, StorageDown) as error:
                    pause, backoff = backoff, min(2 * backoff, patience.backoff_most)
                    _log(
                        run, f"waiting {pause:g} s for {'MLflow' if isinstance(error, ServerError) else 'S3'}: {error}"
                    )
            if deadline is not None and time.monotonic() + pause > deadline:
                _log(run, f"training has ended; what is left waits for `fitv2 track sync {run.url}`")
                return
            until = time.monotonic() + pause
            while time.monotonic() < until and (ended or (alive() and not ended_on_record())):
                time.sleep(min(pause, patience.poll))


class _Process:
    """Tells whether process ``pid`` still runs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._is_parent = os.getppid() == pid

    def __call__(self) -> bool:
        if self._is_parent:  # a parent that died unreaped still answers signals, but is our parent no more
            return os.getppid() == self._pid
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True  # it runs, under another user
        return True


class _Lock:
    """The right to publish a run, for one process at a time; free again when that process is gone."""

    def __init__(self, run: Run) -> None:
        self._path = run.local("tracking/lock")

    def __enter__(self) -> "_Lock":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "ab")  # noqa: SIM115 - __exit__ closes it
        return self

    def held(self) -> bool:
        """Takes the lock if it is free; True if it is ours."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _attempt_has_ended(run: Run) -> bool:
    newest = newest_attempt(run.log.entries())
    return newest > 0 and Attempt(newest, run).ended() is not None


def _log(run: Run, line: str) -> None:
    with open(run.local("tracking/uploader.log"), "a") as file:
        file.write(f"{now()} {redact(line)}\n")


def main() -> int:
    """The process. Exit codes: 0, 2 for bad input (one sentence on stderr), 1 for a bug (its traceback)."""
    parser = argparse.ArgumentParser(prog="python -m fitv2_scale.tracking.uploader", description="Publish a run.")
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--experiment", required=True, help="MLflow experiment; made if it does not exist")
    parser.add_argument(
        "--uri", default=os.environ.get(_URI_VARIABLE, "auto"), help=f"default: ${_URI_VARIABLE} or auto"
    )
    parser.add_argument("--follow", type=int, metavar="PID", help="go on publishing while this process trains")
    args = parser.parse_args()
    try:
        if args.follow is None:
            print(json.dumps(sync(args.run, args.uri, args.experiment)))
            return 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # Slurm sends these to every process of a step; training answers them
        os.nice(10)  # training comes first
        follow(Run.open(args.run), resolve_uri(args.run, args.uri), args.experiment, args.follow)
    except UserError as error:
        print(redact(str(error)), file=sys.stderr)
        return 2
    except Exception:
        print(redact(traceback.format_exc()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
