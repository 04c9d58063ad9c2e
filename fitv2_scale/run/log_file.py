"""The log file of a rank, whose troubles end nothing."""

import logging
import sys
from contextlib import suppress
from pathlib import Path


class LogFile(logging.FileHandler):
    """Appends records to ``path``, whose folder is made when the first one comes. A record that cannot be written is
    dropped, and the next one opens the file again: what logs it has better things to do than to fail."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, delay=True)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            if self.stream is None:
                Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
            return
        stream, self.stream = self.stream, None
        if stream is not None:
            with suppress(OSError):
                stream.close()

    def close(self) -> None:
        with suppress(OSError):
            super().close()
