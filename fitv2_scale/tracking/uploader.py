"""The process that publishes a run to MLflow: training never waits for a server and never imports mlflow.

    python -m fitv2_scale.tracking.uploader RUN --experiment NAME --follow PID

Rank 0 starts one that follows it (``launch``); `fitv2 track sync RUN` does the same without one (``sync``). The
canonical MLflow run holds what COMMITs vouch for, with the times at which it was measured (see ``journal``); a child
run per attempt is ahead of it (see ``live``). An outage of MLflow costs waiting here, and a line in
tracking/uploader.log of the run folder:

    2025-06-01T12:00:00.000000+00:00 MLflow at http://h:5000 does not take it, the journal keeps it, next try in 4 s: …
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

from data_sharding.errors import StorageDown, UserError
from fitv2_scale.run.log import newest_attempt, now
from fitv2_scale.run.redact import redact
from fitv2_scale.run.run import RETRY, Attempt, Run
from fitv2_scale.tracking.locks import Lock, Writer
from fitv2_scale.tracking.publisher import Publisher, ServerError
from fitv2_scale.tracking.uploader_process import URI_VARIABLE


@dataclass(frozen=True)
class Patience:
    """How long the uploader waits for things, in seconds."""

    poll: float = 1.0  # between two looks at the run
    backoff: float = 1.0  # after a first error; doubles with each in a row
    backoff_most: float = 60.0
    last_pass: float = 120.0  # for MLflow, or for another uploader, once training has ended


def follow(
    run: Run,
    uri: str,
    experiment: str,
    over: Callable[[], bool],
    patience: Patience = Patience(),
    say: Callable[[str], None] | None = None,
) -> None:
    """Publishes as the run grows, until ``over()``; then what is left.

    While MLflow fails, it waits and tries again. If that lasts after training has ended, the rest is left to ``sync``.
    ``say`` takes a sentence about each such thing; None: tracking/uploader.log does.
    """
    say = say or (lambda sentence: _log(run, sentence))
    publisher, deadline, backoff = Publisher(run, uri, experiment, say), None, patience.backoff
    with Lock(run) as lock:
        while True:
            # Asked before the pass, so that the pass after the end sees all that was committed.
            ended = over()
            if ended and deadline is None:
                deadline = time.monotonic() + patience.last_pass
            pause = patience.poll
            if lock.held():
                try:
                    with Writer(uri, patience.poll):
                        publisher.publish()
                        if ended:
                            publisher.finish()
                            return
                    if backoff > patience.backoff:
                        say("MLflow takes it again")
                    backoff = patience.backoff
                except (ServerError, StorageDown, UserError, OSError) as error:
                    pause, backoff = backoff, min(2 * backoff, patience.backoff_most)
                    what = {ServerError: f"MLflow at {redact(uri)} does not take it"}.get(type(error), "Not published")
                    say(f"{what}, the journal keeps it, next try in {pause:g} s: {error}")
            if deadline is not None and time.monotonic() + pause > deadline:
                say(f"training has ended; what is left waits for `fitv2 track sync {run.url}`")
                return
            until = time.monotonic() + pause
            while time.monotonic() < until and (ended or not over()):
                time.sleep(min(pause, patience.poll))


def attempt_has_ended(run: Run) -> bool:
    """By its own record; False while storage does not say."""
    with suppress(StorageDown):
        newest = newest_attempt(run.log.entries())
        return newest > 0 and Attempt(newest, run).ended() is not None
    return False


def run_is_over(run: Run) -> bool:
    """True if no further attempt is to be expected: the newest ended, and not because it wants another."""
    with suppress(StorageDown):
        newest = newest_attempt(run.log.entries())
        end = Attempt(newest, run).ended() if newest else None
        return end is not None and end["code"] != RETRY
    return False


class Process:
    """Tells whether process ``pid`` still runs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._is_parent = os.getppid() == pid

    def alive(self) -> bool:
        if self._is_parent:  # a parent that died unreaped still answers signals, but is our parent no more
            return os.getppid() == self._pid
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True  # it runs, under another user
        return True


def _log(run: Run, line: str) -> None:
    with suppress(OSError), open(run.local("tracking/uploader.log"), "a") as file:  # a full disk must not end this
        file.write(f"{now()} {redact(line)}\n")


def main() -> int:
    """The process. Exit codes: 0, 2 for bad input (one sentence on stderr), 1 for a bug (its traceback)."""
    parser = argparse.ArgumentParser(prog="python -m fitv2_scale.tracking.uploader", description="Publish a run.")
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--experiment", required=True, help="MLflow experiment; made if it does not exist")
    parser.add_argument("--follow", type=int, required=True, metavar="PID", help="the process that trains")
    args = parser.parse_args()
    trainer = Process(args.follow)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # Slurm sends these to every process of a step; training answers them
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
