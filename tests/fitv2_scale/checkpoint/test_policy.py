"""Which commits stay, and when one is due: compared with the plain definitions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fitv2_scale.checkpoint.policy import SaveSchedule, to_retire
from fitv2_scale.config.sections import CheckpointConfig
from fitv2_scale.run.log import LogEntry


def commits(*steps: int) -> list[LogEntry]:
    return [LogEntry(n, "COMMIT", 1, "", "", {"step": step}) for n, step in enumerate(steps, 1)]


def retired(steps: list[int], bad: set[int] = frozenset(), **config) -> list[int]:
    return [e.fields["step"] for e in to_retire(commits(*steps), bad, CheckpointConfig(**config))]


@pytest.mark.parametrize(
    "steps,bad,config,expected",
    [
        ([], set(), {}, []),
        ([10, 20], set(), {}, []),
        ([10, 20, 30, 40], set(), {}, [10, 20]),
        ([10, 20, 30, 40], set(), {"keep_last": 3}, [10]),
        ([10, 20, 30, 40], {4}, {}, [10]),  # the damaged one does not count as kept
        ([10, 20, 30, 40], {1, 3}, {}, []),  # nor is one ever deleted
        ([10, 20, 30, 40, 50, 60], set(), {"keep_every": 30}, [10, 20, 40]),
        ([10, 20, 30, 40, 50, 60], set(), {"milestones": [20, 35]}, [10, 30, 40]),
    ],
)
def test_what_is_retired(steps, bad, config, expected):
    assert retired(steps, bad, **config) == expected


@given(st.lists(st.integers(0, 50), max_size=20), st.sets(st.integers(1, 20)), st.integers(2, 6))
def test_the_newest_two_sound_commits_always_stay(steps, bad, keep_last):
    entries = commits(*steps)
    gone = to_retire(entries, bad, CheckpointConfig(keep_last=keep_last, keep_every=7))
    sound = [e for e in entries if e.n not in bad]
    assert not {e.n for e in gone} & ({e.n for e in sound[-2:]} | bad)
    assert all(e.fields["step"] % 7 for e in gone)
    assert len(sound) - len(gone) >= min(len(sound), keep_last)


def test_fewer_than_two_cannot_be_asked_for():
    with pytest.raises(ValidationError, match="keep_last"):
        CheckpointConfig(keep_last=1)


def due_steps(config: CheckpointConfig, paces: list[float], start: int = 0, ranks: int = 1) -> list[int]:
    """The steps after which a run commits whose steps take ``paces`` seconds; each rank's own clock is off."""
    now, shared = [0.0], []
    own = [SaveSchedule(config, start, lambda value: shared[-1], lambda r=r: now[0] + 1e4 * r) for r in range(ranks)]
    own[0]._broadcast = lambda value: shared.append(value) or value
    found = []
    for step, seconds in enumerate(paces, start + 1):
        now[0] += seconds
        said = {schedule.due(step) for schedule in own}
        assert len(said) == 1, "the ranks disagree"
        if said.pop():
            found.append(step)
            now[0] += 3
            for schedule in own:
                schedule.saved(step)
    due_steps.asked = len(shared)
    return found


def test_by_steps():
    config = CheckpointConfig(every_steps=10, keep_every=25, milestones=[3, 17])
    assert due_steps(config, [1.0] * 50, ranks=2) == [3, 10, 17, 20, 25, 30, 40, 50]
    assert due_steps(config, [1.0] * 10, start=14) == [17, 20]


def test_by_minutes_the_ranks_agree_and_rarely_talk():
    config = CheckpointConfig(every_minutes=1)
    assert due_steps(config, [0.125] * 4800, ranks=3) == [480 * n for n in range(1, 11)]
    assert due_steps.asked < 150  # of 4800 steps
    assert due_steps(config, [100.0] * 5) == [1, 2, 3, 4, 5]  # never between steps
    assert due_steps(CheckpointConfig(every_minutes=1, milestones=[7]), [10.0] * 14) == [6, 7, 13]


def test_by_minutes_a_slower_pace_is_noticed():
    """Steps that suddenly take four times as long: the interval grows by less than that."""
    first, *_ = due_steps(CheckpointConfig(every_minutes=1), [0.1] * 100 + [0.4] * 900)
    assert 60 <= 10 + (first - 100) * 0.4 < 130
