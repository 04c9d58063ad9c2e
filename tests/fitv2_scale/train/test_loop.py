"""How an attempt ends: its code, its reason, and what leaves `train`, by what was raised in it."""

import os
from types import SimpleNamespace

import pytest

from data_sharding.errors import DataError, StorageDown, UserError
from fitv2_scale.checkpoint.copies import CopiesDiffer
from fitv2_scale.run.log import StaleAttempt
from fitv2_scale.run.run import BAD_INPUT, BUG, DONE, GIVE_UP, RETRY, Run
from fitv2_scale.train.loop import _recorded, train
from tests.support.ranks import run_ranks


def ended(error: BaseException, first: bool = True) -> list[tuple[int, str]]:
    """What is in end.json; raises what leaves the attempt."""
    recorded: list[tuple[int, str]] = []
    attempt = SimpleNamespace(end=lambda code, reason: recorded.append((code, reason)))
    words = SimpleNamespace(settle=lambda raised: raised)
    with _recorded(attempt, SimpleNamespace(rank=int(not first), is_first=first, last_words=words)):
        raise error
    return recorded


def test_errors_that_another_attempt_may_not_meet(capsys):
    assert ended(StorageDown("no answer")) == [(RETRY, "no answer")]
    assert capsys.readouterr().err == "no answer\n"
    assert ended(CopiesDiffer("x differs")) == [(RETRY, "x differs")]
    assert ended(StaleAttempt("attempt 2 runs")) == [(GIVE_UP, "attempt 2 runs")]
    assert capsys.readouterr().err == "x differs\nattempt 2 runs\n"
    assert ended(StaleAttempt("attempt 2 runs"), first=False) == [] and capsys.readouterr().err == ""


def test_another_rank_points_to_the_one_that_says_why(capsys):
    error = StorageDown("no answer")
    error.origin = "rank 0 on n1"
    assert ended(error, first=False) == []
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
    attempt = SimpleNamespace(end=lambda code, reason: codes.append((code, reason)))
    for error in (UserError("no such key"), ValueError("a bug")):
        world = SimpleNamespace(rank=0, is_first=True, last_words=SimpleNamespace(settle=lambda raised: raised))
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
