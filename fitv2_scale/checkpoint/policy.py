"""When to commit, and which commits to keep: the decisions, as arithmetic. ``checkpointer`` carries them out."""

import time
from collections.abc import Callable, Collection, Sequence

from fitv2_scale.config.sections import CheckpointConfig
from fitv2_scale.run.log import LogEntry


def to_retire(commits: Sequence[LogEntry], quarantined: Collection[int], config: CheckpointConfig) -> list[LogEntry]:
    """The commits (oldest first) that are no longer needed.

    Never one that is known to be damaged, which does not count as kept either; never a milestone or one of
    ``keep_every``; never one of the newest ``keep_last``.
    """
    sound = [entry for entry in commits if entry.n not in quarantined]
    return [entry for entry in sound[: -config.keep_last] if not config.keeps(entry.fields["step"])]


class SaveSchedule:
    """Says after which steps to commit, alike on all ranks.

    By steps this is arithmetic. By minutes, rank 0's clock decides: ``broadcast`` gives its value to all ranks, not at
    each step but at steps that all have agreed on before. At each of them the next is set half way to where the time
    would be up at the pace so far: so there are few of them, and a slower pace is noticed.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        start: int,
        broadcast: Callable[[float], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._broadcast, self._clock = config, broadcast, clock
        self.saved(start)

    def saved(self, step: int) -> None:
        """A save was started after ``step``: the interval starts again."""
        self._from, self._began, self._ask = step, self._clock(), step + 1

    def due(self, step: int) -> bool:
        """Whether to commit after ``step``. All ranks ask for every step, once."""
        if self._config.keeps(step):
            return True
        if self._config.every_minutes is None:
            return step % self._config.every_steps == 0
        if step != self._ask:
            return False
        interval, elapsed = 60 * self._config.every_minutes, self._broadcast(self._clock() - self._began)
        pace = elapsed / (step - self._from)
        self._ask = step + max(1, int((interval - elapsed) / pace / 2)) if pace > 0 else step + 1
        return elapsed >= interval
