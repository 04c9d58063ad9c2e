"""The signals that ask a run to save and end."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """Notes SIGTERM, SIGUSR1 (which Slurm sends before a time limit) and Ctrl-C instead of dying of them.

    A second Ctrl-C interrupts at once, without saving.
    """

    def __init__(self) -> None:
        self.name: str | None = None

    def _note(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def caught(self) -> Generator["StopSignal"]:
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may set handlers
            return
        before = {s: signal.signal(s, self._note) for s in _SIGNALS}
        blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # by a launcher, until they can be noted
        try:
            yield self
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)  # a repeated one must not kill a rank that is leaving
            for s, handler in before.items():
                signal.signal(s, handler)
