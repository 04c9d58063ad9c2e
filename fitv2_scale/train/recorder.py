"""What rank 0 records of an attempt: metrics and pictures in the journal, and its pace for the launchers."""

import logging
from collections.abc import Callable
from typing import Protocol

from data_sharding.errors import UserError
from fitv2_scale.run.run import Attempt
from fitv2_scale.tracking.journal import Journal

log = logging.getLogger(__name__)


class Recorder(Protocol):
    """All ranks call it alike."""

    def metrics(self, step: int, values: dict[str, float]) -> list[str]:
        """Records measurements of ``step``. Returns sentences for the user: what keeps them from MLflow for good."""

    def picture(self, step: int, make_png: Callable[[], bytes]) -> None:
        """Stores a picture as samples/<step>.png. If it cannot be drawn, or the storage refuses it, that is logged and
        training continues. One rank alone calls ``make_png``, so it must not wait for others."""

    def seal(self) -> None:
        """Makes everything recorded so far durable: to be called before each COMMIT (see ``Journal.seal``)."""

    def pace(self, step_seconds: float, save_seconds: float) -> None:
        """Records the longest step and the longest save (see ``Attempt.record_pace``)."""


class NullRecorder:
    """That of all ranks but the first: records nothing."""

    def metrics(self, step: int, values: dict[str, float]) -> list[str]:
        return []

    def picture(self, step: int, make_png: Callable[[], bytes]) -> None: ...
    def seal(self) -> None: ...
    def pace(self, step_seconds: float, save_seconds: float) -> None: ...


class RankZeroRecorder:
    """``check_uploader`` is called with each record of metrics: it restarts the uploader if that has died, and returns
    what the user should be told."""

    def __init__(self, attempt: Attempt, journal: Journal, check_uploader: Callable[[], list[str]]):
        self._attempt, self._journal, self._check_uploader = attempt, journal, check_uploader

    def metrics(self, step: int, values: dict[str, float]) -> list[str]:
        self._journal.metrics(step, values)
        return self._check_uploader()

    def picture(self, step: int, make_png: Callable[[], bytes]) -> None:
        path = f"samples/{step:08d}.png"
        try:
            png = make_png()
        except Exception as error:  # of any kind, such as no memory for the decoder
            log.warning("the pictures of step %d could not be drawn: %s", step, error, exc_info=error)
            return
        try:
            self._attempt.run.store.put(path, png)
            self._journal.picture(step, path)
        except (OSError, UserError) as error:
            log.warning("the pictures of step %d could not be stored: %s", step, error)

    def seal(self) -> None:
        self._journal.seal()

    def pace(self, step_seconds: float, save_seconds: float) -> None:
        self._attempt.record_pace(step_seconds, save_seconds)
