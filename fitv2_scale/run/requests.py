"""What people ask of a running attempt through its run: STOP in the log, and saves. Seen on rank 0, by a thread."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from data_sharding.errors import StorageDown
from fitv2_scale.run.run import RETRY, Attempt, Run

LOG_SEEN = "FITV2_LOG_SEEN"  # set by a launcher: a STOP behind this entry of the log is meant for its attempts
_POLL = 5.0  # seconds


def save_path(attempt: int) -> str:
    """Where `fitv2 save` puts its order; each new content is a new order."""
    return f"attempts/{attempt}/save"


class Orders:
    """What was asked so far: ``stop``, a STOP in the log since this attempt began, and the number of ``saves``."""

    def __init__(self, run: Run, attempt: int, poll: float = _POLL) -> None:
        self._run, self._attempt, self._poll = run, attempt, poll
        claim = next(e.n for e in run.log.entries() if e.kind == "CLAIM" and e.attempt == attempt)
        # One that came between the launcher's look and the CLAIM counts as well.
        self._seen = min(claim, int(os.environ.get(LOG_SEEN, claim)))
        self.stop, self.saves = False, 0
        self._order = self._read_order()

    def follow(self, ended: threading.Event) -> None:
        """Looks every few seconds until ``ended`` is set."""
        while True:
            with suppress(OSError, StorageDown):  # asked again soon
                self._look()
            if ended.wait(self._poll):
                return

    def _look(self) -> None:
        stops = [e for e in self._run.log.entries() if e.kind == "STOP" and e.n > self._seen]
        if any(e.fields.get("at_once") for e in stops):
            Attempt(self._attempt, self._run).end(RETRY, "STOP: at once, without saving")
            os._exit(RETRY)  # launchers end the other ranks when one fails
        self.stop = bool(stops)
        if (order := self._read_order()) != self._order:
            self._order, self.saves = order, self.saves + 1

    def _read_order(self) -> bytes | None:
        try:
            return self._run.store.read(save_path(self._attempt))
        except FileNotFoundError:
            return None


@contextmanager
def followed(run: Run, attempt: int, is_first: bool) -> Iterator[Orders | None]:
    """The orders for this attempt, kept up to date by a thread; None on other ranks than the first."""
    if not is_first:
        yield None
        return
    orders, ended = Orders(run, attempt), threading.Event()
    thread = threading.Thread(target=orders.follow, args=(ended,), name="orders", daemon=True)
    thread.start()
    try:
        yield orders
    finally:
        ended.set()
        thread.join()
