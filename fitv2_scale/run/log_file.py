"""The log file of a rank, whose troubles end nothing."""

import logging
import sys
from contextlib import suppress
from pathlib import Path


class LogFile(logging.FileHandler):
    """Appends records to ``path``, whose folder is made when the first one comes. A record that cannot be written goes
    to standard error, the first one with the reason, and the next one opens the file again: what logs it has better
    things to do than to fail."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, delay=True)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._elsewhere = logging.StreamHandler()
        self._said = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self.stream is None:
                Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            super().emit(record)
        except OSError as error:
            self._say(record, error)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        stream, self.stream = self.stream, None
        if stream is not None:
            with suppress(OSError):
                stream.close()
        self._say(record, error)

    def close(self) -> None:
        with suppress(OSError):
            super().close()

    def _say(self, record: logging.LogRecord, error: OSError) -> None:
        if not self._said:
            print(f"The log {self.baseFilename} cannot be written, its lines come here: {error}", file=sys.stderr)
            self._said = True
        self._elsewhere.emit(record)
