"""The signals that ask a run to save and end."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager

from tqdm import tqdm

from fitv2_scale.run.stop_signals import STOP_SIGNALS, SUPERVISED, noted_signals

_INTERRUPTED = 130  # the exit code of what Ctrl-C ends
_PATIENCE = 5.0  # seconds in which a second Ctrl-C has to have its effect


class StopSignal:
    """Notes the signals of ``STOP_SIGNALS`` instead of dying of them, and so the death of the launcher.

    Rank 0 says at once that it has noted one, even while its main thread waits in a collective or for storage. A second
    Ctrl-C interrupts without saving: by KeyboardInterrupt, or by an exit if that takes too long.
    """

    def __init__(self, joins: bool = False) -> None:
        """``joins``: until ``joined``, it prints nothing: what waits for the other ranks ends, and says why."""
        self._joining = joins
        self.step: int | None = None  # steps done; None until the first one is about to be taken
        self._noted: str | None = None
        self._interrupts = 0
        self._launcher = _launcher()

    @property
    def name(self) -> str | None:
        """Why this rank is to save and end, if it is."""
        if self._noted is None and self._launcher not in (None, os.getppid()):
            self._noted = "the launcher died"
        return self._noted

    def joined(self) -> None:
        """All ranks have come. Says which signal was noted before."""
        self._joining = False
        if self._noted in signal.Signals.__members__:
            _say(self._sentence(signal.Signals[self._noted]))

    @contextmanager
    def caught(self, for_good: bool = False) -> Generator["StopSignal"]:
        """Notes signals meanwhile. Then their handlers are those of before; or, ``for_good``, they are ignored: a
        process that has saved and is about to end must not die of a repeated one, which any of its threads may get."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may set handlers
            return
        with self._announced():
            before = {s: signal.signal(s, self._note) for s in noted_signals()}
            blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # by a launcher, until they can be noted
            try:
                yield self
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
                for s, handler in before.items():
                    signal.signal(s, signal.SIG_IGN if for_good else handler)

    def _note(self, number: int, frame: object) -> None:
        self._noted = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def _announced(self) -> Generator[None]:
        """Python's handlers wait for the main thread, which may be in a long call; this thread does not."""
        received, arriving = socket.socketpair()
        arriving.setblocking(False)
        ended = threading.Event()
        thread = threading.Thread(target=self._announce, args=(received, ended), name="signals", daemon=True)
        before = signal.set_wakeup_fd(arriving.fileno(), warn_on_full_buffer=False)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            ended.set()
            arriving.close()
            thread.join()
            received.close()

    def _announce(self, received: socket.socket, ended: threading.Event) -> None:
        said = False
        while number := received.recv(1):
            if number[0] not in STOP_SIGNALS:
                continue
            self._interrupts += number[0] == signal.SIGINT
            if self._interrupts > 1:
                _say("Ctrl-C again: quits without saving")
                if not ended.wait(_PATIENCE):
                    os._exit(_INTERRUPTED)
            elif not said or number[0] == signal.SIGINT:
                said = True
                if self._joining:
                    continue
                _say(self._sentence(signal.Signals(number[0])))

    def _sentence(self, number: signal.Signals) -> str:
        what = (
            "ends when it has loaded"
            if self.step is None
            else f"saving at step {self.step} or soon after, then it ends"
        )
        again = "; Ctrl-C again quits without saving" if number == signal.SIGINT else ""
        return f"{number.name}: {what}{again}"


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(f"fitv2: {text}", file=sys.stderr)


def _launcher() -> int | None:
    """The process that started this rank and outlives it unless it is killed; None without such a launcher."""
    if SUPERVISED in os.environ:
        return int(os.environ[SUPERVISED])
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
