"""A rank's log: its warnings, and the traceback of what ended it, or one of its threads."""

import logging
import threading
from collections.abc import Generator
from contextlib import contextmanager

from data_sharding.errors import UserError
from data_sharding.storage import retry
from fitv2_scale.run.log_file import LogFile
from fitv2_scale.run.run import Attempt

log = logging.getLogger(__name__)


@contextmanager
def log_to(attempt: Attempt, rank: int) -> Generator[None]:
    """Appends this rank's log records, tracebacks included, to attempts/<n>/logs/rank-00000.log. If the run is on
    S3, the file is uploaded at the end; rank 0 uploads all that its node has of the attempt, and prints what is logged
    about storage that does not answer."""
    run, folder = attempt.run, attempt.path
    file = f"{folder}/logs/rank-{rank:05d}.log"
    handler = LogFile(run.local_path(file))
    terminal = logging.StreamHandler() if rank == 0 else logging.NullHandler()
    logging.getLogger().addHandler(handler)
    retry.log.addHandler(terminal)
    before, threading.excepthook = threading.excepthook, _log_thread
    try:
        yield
    finally:
        threading.excepthook = before
        retry.log.removeHandler(terminal)
        logging.getLogger().removeHandler(handler)
        try:
            handler.close()
            run.upload(folder if rank == 0 else file)
        except (OSError, UserError) as error:
            log.warning("%s could not be uploaded: it stays on its node: %s", run.local_path(folder), error)


def _log_thread(dead: threading.ExceptHookArgs) -> None:
    name, error = dead.thread.name if dead.thread else "unknown", dead.exc_value
    log.error("the thread %s died: %r", name, error, exc_info=error)
    threading.__excepthook__(dead)
