"""How an attempt ends: its code, its reason, and what leaves `train`, by what was raised in it."""

import os
from types import SimpleNamespace

import pytest

from data_sharding.errors import DataError, StorageDown, UserError
from fitv2_scale.checkpoint.copies import CopiesDiffer
from fitv2_scale.parallel.failures import RankLost
from fitv2_scale.run.log import StaleAttempt
from fitv2_scale.run.run import BAD_INPUT, BUG, DONE, GIVE_UP, RETRY, Run
from fitv2_scale.train.loop import _recorded, train
from tests.support.ranks import run_ranks


def ended(error: BaseException, rank: int = 0) -> list[tuple]:
    """What ``rank`` of three writes to end.json; raises what leaves the attempt."""
    recorded: list[tuple] = []

    def end(code: int, reason: str, lost: tuple[int, ...], stands_in: bool) -> None:
        recorded.append((code, reason, *([lost] if lost else []), *(["stands in"] if stands_in else [])))

    words = SimpleNamespace(settle=lambda raised: raised)
    world = SimpleNamespace(rank=rank, size=3, is_first=rank == 0, last_words=words)
    with _recorded(SimpleNamespace(end=end), world):
        raise error
    return recorded


def test_lost_ranks_are_recorded_by_the_lowest_that_is_left(capsys, caplog):
    lost = RankLost("rank 1 on n1 ended", [1])
    assert [ended(lost, rank) for rank in (0, 2)] == [[(RETRY, str(lost), (1,))], []]
    assert capsys.readouterr().err == 2 * "rank 1 on n1 ended\n"
    assert [record.exc_info[1] for record in caplog.records] == [lost, lost]  # with all that led to it
    first = RankLost("rank 0 on n1 ended", [0])
    assert [ended(first, rank) for rank in (1, 2)] == [[(RETRY, str(first), (0,), "stands in")], []]
    assert ended(RankLost("two ended", [0, 1]), 2) == [(RETRY, "two ended", (0, 1), "stands in")]


def test_errors_that_another_attempt_may_not_meet(capsys):
    assert ended(StorageDown("no answer")) == [(RETRY, "no answer")]
    assert capsys.readouterr().err == "no answer\n"
    assert ended(CopiesDiffer("x differs")) == [(RETRY, "x differs")]
    assert ended(StaleAttempt("attempt 2 runs")) == [(GIVE_UP, "attempt 2 runs")]
    assert capsys.readouterr().err == "x differs\nattempt 2 runs\n"
    assert ended(StaleAttempt("attempt 2 runs"), rank=1) == [] and capsys.readouterr().err == ""


def test_another_rank_points_to_the_one_that_says_why(capsys):
    error = StorageDown("no answer")
    error.origin = "rank 0 on n1"
    assert ended(error, rank=1) == []
    assert capsys.readouterr().err == "rank 0 on n1 says why this ends\n"


@pytest.mark.parametrize("error", [UserError("no such key"), DataError("a.tar is damaged")])
def test_bad_input_is_raised_for_the_command_line_to_print(error):
    cause = OSError("why")
    error.__cause__ = cause
    with pytest.raises(type(error)) as raised:
        ended(error)
    assert raised.value is error and error.__cause__ is cause


@pytest.mark.parametrize("error", [ZeroDivisionError("1 / 0"), KeyboardInterrupt()])
def test_a_bug_is_raised_and_in_the_log(error, caplog):
    with pytest.raises(type(error)):
        ended(error)
    assert "rank 0 failed" in caplog.text and caplog.records[0].exc_info


def test_the_codes_of_what_is_raised(monkeypatch):
    codes = []
    attempt = SimpleNamespace(end=lambda code, reason, *_, **__: codes.append((code, reason)))
    for error in (UserError("no such key"), ValueError("a bug")):
        words = SimpleNamespace(settle=lambda raised: raised)
        world = SimpleNamespace(rank=0, size=1, is_first=True, last_words=words)
        with pytest.raises(type(error)), _recorded(attempt, world):
            raise error
    assert codes == [(BAD_INPUT, "no such key"), (BUG, repr(ValueError("a bug")))]


def train_unread(config) -> int:
    """As behind `2>&1 | head`: what it prints goes into a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    for stream in (1, 2):
        os.dup2(writer, stream)
    return train(config)


def test_training_goes_on_when_nobody_reads_what_it_prints(tiny):
    config = tiny(train__steps=4, checkpoint__every_steps=2)
    assert run_ranks(2, train_unread, config) == [DONE, DONE]
    assert [entry.fields["step"] for entry in Run.open(config.run).log.commits()] == [2, 4]
