"""Requests to a running attempt, made through its run: to stop (STOP in the log) and to save. Rank 0 polls for them."""

import logging
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager

from data_sharding.errors import StorageDown
from fitv2_scale.run.run import RETRY, Attempt, Run

LOG_SEEN = "FITV2_LOG_SEEN"  # set by a launcher: length of the run's log; a later STOP is meant for its attempts
_POLL = 5.0  # seconds

log = logging.getLogger(__name__)


def save_request_path(attempt: int) -> str:
    """Where `fitv2 save` writes its request; each new content is a new request."""
    return f"attempts/{attempt}/save"


class Requests:
    """What was requested so far: ``stop`` is True if the log has a STOP for this attempt; ``saves`` counts requests."""

    def __init__(self, run: Run, attempt: int, poll: float = _POLL) -> None:
        self._run, self._attempt, self._poll = run, attempt, poll
        claim = next(e.n for e in run.log.entries() if e.kind == "CLAIM" and e.attempt == attempt)
        # A STOP between the launcher's look at the log and the CLAIM counts as well.
        self._seen = min(claim, int(os.environ.get(LOG_SEEN, claim)))
        self.stop, self.saves = False, 0
        self._save_request = self._read_save_request()

    def poll_until(self, ended: threading.Event) -> None:
        """Looks for requests every few seconds until ``ended`` is set."""
        problem = ""
        while True:
            try:
                self._poll_once()
            except (OSError, StorageDown):
                pass  # tried again at the next poll
            except Exception as error:  # such as a damaged log; the next save will meet it, and requests may still come
                if str(error) != problem:
                    problem = str(error)
                    log.warning("requests to stop or save cannot be read: %s", problem, exc_info=error)
            if ended.wait(self._poll):
                return

    def _poll_once(self) -> None:
        stops = [e for e in self._run.log.entries() if e.kind == "STOP" and e.n > self._seen]
        if any(e.fields.get("at_once") for e in stops):
            Attempt(self._attempt, self._run).end(RETRY, "STOP: at once, without saving")
            os._exit(RETRY)  # launchers end the other ranks when one fails
        self.stop = bool(stops)
        if (request := self._read_save_request()) != self._save_request:
            self._save_request, self.saves = request, self.saves + 1

    def _read_save_request(self) -> bytes | None:
        try:
            return self._run.store.read(save_request_path(self._attempt))
        except FileNotFoundError:
            return None


@contextmanager
def watch_requests(run: Run, attempt: int, is_first: bool) -> Generator[Requests | None]:
    """The requests to this attempt, kept up to date by a thread; None on ranks other than 0."""
    if not is_first:
        yield None
        return
    requests, ended = Requests(run, attempt), threading.Event()
    thread = threading.Thread(target=requests.poll_until, args=(ended,), name="requests", daemon=True)
    thread.start()
    try:
        yield requests
    finally:
        ended.set()
        thread.join()
