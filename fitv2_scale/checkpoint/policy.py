"""When to commit, and which commits to keep. Decided here, in arithmetic; done elsewhere."""

import time
from collections.abc import Callable, Collection, Sequence

from fitv2_scale.config.sections import CheckpointConfig
from fitv2_scale.run.log import LogEntry


def to_retire(commits: Sequence[LogEntry], quarantined: Collection[int], config: CheckpointConfig) -> list[LogEntry]:
    """The commits (oldest first) that are no longer needed.

    Never one that is known to be damaged, which also does not count as kept; nor one kept for ever; nor one of the
    newest ``keep_last``.
    """
    sound = [entry for entry in commits if entry.n not in quarantined]
    return [entry for entry in sound[: -config.keep_last] if not config.keeps(entry.fields["step"])]


class Cadence:
    """Says after which steps to commit, alike on all ranks.

    By steps this is arithmetic. By minutes, rank 0's clock decides, and the others hear of it (``share``: rank 0's
    value on all ranks) not at each step but at steps agreed on before: at each of them the next is set half way to
    where the time would be up at the pace so far, so that there are few, and a slower pace is noticed.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        start: int,
        share: Callable[[float], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._share, self._clock = config, share, clock
        self.saved(start)

    def saved(self, step: int) -> None:
        """A commit was made after ``step``, or was tried: the interval begins anew."""
        self._from, self._began, self._ask = step, self._clock(), step + 1

    def due(self, step: int) -> bool:
        """Whether to commit after ``step``. All ranks ask for every step, once."""
        if self._config.keeps(step):
            return True
        if self._config.every_minutes is None:
            return step % self._config.every_steps == 0
        if step != self._ask:
            return False
        interval, elapsed = 60 * self._config.every_minutes, self._share(self._clock() - self._began)
        pace = elapsed / (step - self._from)
        self._ask = step + max(1, int((interval - elapsed) / pace / 2)) if pace > 0 else step + 1
        return elapsed >= interval
