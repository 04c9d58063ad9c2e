"""The process that publishes a run to MLflow, so that training never waits for a server and never imports mlflow.

    python -m fitv2_scale.tracking.uploader RUN --experiment NAME --follow PID

Rank 0 starts one that follows it (``uploader_process``); `fitv2 track sync RUN` does the same without such a process
(``sync``). The canonical MLflow run holds the committed measurements with the times at which they were made (see
``journal``); the child run of each attempt is ahead of it (see ``live_run``). During an outage of MLflow only this
process waits, and writes a line to tracking/uploader.log in the run folder:

    2025-06-01T12:00:00.000000+00:00 MLflow at http://h:5000 failed; the journal keeps the data, retry in 4 s: …
"""

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from data_sharding.errors import UserError
from fitv2_scale.run.log import newest_attempt, now
from fitv2_scale.run.redact import redact
from fitv2_scale.run.run import RETRY, Attempt, Run
from fitv2_scale.tracking.destination import URI_VARIABLE
from fitv2_scale.tracking.locks import RunLock, writer_lock
from fitv2_scale.tracking.publisher import Publisher, ServerError
from fitv2_scale.tracking.uploader_state import write_state


@dataclass(frozen=True)
class Timing:
    """The uploader's waiting times, in seconds."""

    poll: float = 1.0  # between two reads of the run
    backoff: float = 1.0  # after a first error; doubles with each further one in a row
    longest_backoff: float = 60.0
    last_pass: float = 120.0  # for MLflow, or for another uploader, once training has ended
    patience: float = 600.0  # of failures in a row, after which training tells the user


def follow(
    run: Run,
    uri: str,
    experiment: str,
    over: Callable[[], bool],
    timing: Timing = Timing(),
    say: Callable[[str], None] | None = None,
) -> None:
    """Publishes as the run grows, until ``over()``; then publishes the rest.

    While MLflow fails, it waits and tries again. If MLflow still fails some time after training has ended, it gives up
    and leaves the rest to ``sync``. ``say`` takes a sentence about each failure; None writes to tracking/uploader.log.
    """
    say = say or (lambda sentence: _log(run, sentence))
    publisher, deadline, report = Publisher(run, uri, experiment, say), None, _Report(run, uri, timing, say)
    with RunLock(run) as lock:
        while True:
            # Before the pass, so that the last pass sees everything that was committed.
            ended = over()
            if ended and deadline is None:
                deadline = time.monotonic() + timing.last_pass
            pause = timing.poll
            if lock.acquire():
                try:
                    with writer_lock(uri, timing.poll):
                        publisher.publish()
                        if ended:
                            publisher.finish()
                    report.works()
                    if ended:
                        return
                except (ServerError, UserError, OSError) as error:
                    pause = report.failed(error)
            if deadline is not None and time.monotonic() + pause > deadline:
                say(f"training has ended; run `fitv2 track sync {run.url}` to publish the rest")
                return
            until = time.monotonic() + pause
            while time.monotonic() < until and (ended or not over()):
                time.sleep(min(pause, timing.poll))


class _Report:
    """Says in the log how publishing goes, and leaves it in the run for training and `fitv2 status`."""

    def __init__(self, run: Run, uri: str, timing: Timing, say: Callable[[str], None]) -> None:
        self._run, self._uri, self._timing, self._say = run, uri, timing, say
        self._backoff, self._since = timing.backoff, 0.0
        self._written: tuple[str, bool] | None = None

    def works(self) -> None:
        if self._since:
            self._say("MLflow works again")
        self._backoff, self._since = self._timing.backoff, 0.0
        self._write("", False)

    def failed(self, error: Exception) -> float:
        """Seconds to wait until the next try."""
        pause, self._backoff = self._backoff, min(2 * self._backoff, self._timing.longest_backoff)
        self._since = self._since or time.monotonic()
        what = f"MLflow at {redact(self._uri)} failed" if isinstance(error, ServerError) else "Not published"
        self._say(f"{what}; the journal keeps the data, retry in {pause:g} s: {error}")
        lasting = isinstance(error, ServerError) and error.lasting
        long = time.monotonic() - self._since > self._timing.patience
        self._write(f"{what}, the journal keeps the data: {error}", lasting or long)
        return pause

    def _write(self, trouble: str, tell: bool) -> None:
        if self._written != (trouble, tell):
            write_state(self._run, trouble, tell)
            self._written = trouble, tell


def attempt_has_ended(run: Run) -> bool:
    """Whether the newest attempt has written its end.json; False while storage does not answer."""
    with suppress(UserError):
        newest = newest_attempt(run.log.entries())
        return newest > 0 and Attempt(newest, run).read_end() is not None
    return False


def run_is_over(run: Run) -> bool:
    """True if no further attempt is expected: the newest has ended, with an exit code that does not ask for one."""
    with suppress(UserError):
        newest = newest_attempt(run.log.entries())
        end = Attempt(newest, run).read_end() if newest else None
        return end is not None and end["code"] != RETRY
    return False


class Process:
    """Tells whether the process ``pid`` still runs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._is_parent = os.getppid() == pid

    def alive(self) -> bool:
        if self._is_parent:  # a dead parent that nobody has reaped still accepts signals, but is no longer our parent
            return os.getppid() == self._pid
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True  # it runs, under another user
        return True


def _log(run: Run, line: str) -> None:
    with suppress(OSError), open(run.local_path("tracking/uploader.log"), "a") as file:  # a full disk must not stop us
        file.write(f"{now()} {redact(line)}\n")


def main() -> int:
    """The process. Exit codes: 0, 2 for bad input (one sentence on stderr), 1 for a bug (its traceback)."""
    parser = argparse.ArgumentParser(prog="python -m fitv2_scale.tracking.uploader", description="Publish a run.")
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--experiment", required=True, help="MLflow experiment; created if it does not exist")
    parser.add_argument("--follow", type=int, required=True, metavar="PID", help="the process that trains")
    args = parser.parse_args()
    trainer = Process(args.follow)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # Slurm sends these to every process of a step; only training reacts
    os.nice(10)  # training comes first
    try:
        run = Run.open(args.run)
        over = lambda: not trainer.alive() or attempt_has_ended(run)  # noqa: E731
        follow(run, os.environ[URI_VARIABLE], args.experiment, over)
    except UserError as error:
        print(redact(str(error)), file=sys.stderr)
        return 2
    except Exception:
        print(redact(traceback.format_exc()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
