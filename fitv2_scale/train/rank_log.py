"""A rank's log: its warnings, and the traceback of what ended it, or one of its threads."""

import logging
import threading
from collections.abc import Generator
from contextlib import contextmanager

from data_sharding.errors import UserError
from fitv2_scale.run.run import Attempt

log = logging.getLogger(__name__)


@contextmanager
def log_to(attempt: Attempt, rank: int) -> Generator[None]:
    """Appends this rank's log records, tracebacks included, to attempts/<n>/logs/rank-00000.log. If the run is on
    S3, the file is uploaded at the end; rank 0 uploads all that its node has of the attempt."""
    run, folder = attempt.run, attempt.path
    file = f"{folder}/logs/rank-{rank:05d}.log"
    run.local_path(file).parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(run.local_path(file), delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    before, threading.excepthook = threading.excepthook, _log_thread
    try:
        yield
    finally:
        threading.excepthook = before
        logging.getLogger().removeHandler(handler)
        try:
            handler.close()
            run.upload(folder if rank == 0 else file)
        except (OSError, UserError) as error:
            log.warning("%s could not be uploaded: it stays on its node: %s", run.local_path(folder), error)


class _LogFile(logging.FileHandler):
    """Drops what it cannot write, also if the file cannot be opened."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)  # says so on standard error


def _log_thread(dead: threading.ExceptHookArgs) -> None:
    name, error = dead.thread.name if dead.thread else "unknown", dead.exc_value
    log.error("the thread %s died: %r", name, error, exc_info=error)
    threading.__excepthook__(dead)
