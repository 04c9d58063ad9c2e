"""A rank that hangs, was killed or is stopped is named by the others, also before there is an attempt."""

import contextlib
import io
import logging.handlers
import os
import re
import signal
import socket
import time
from datetime import timedelta

import pytest

from fitv2_scale.cli.__main__ import main
from fitv2_scale.parallel import failures, presence, world
from fitv2_scale.parallel.presence import waited_for
from fitv2_scale.train.loop import train
from tests.services.ports import free_port
from tests.support.ranks import Ranks
from tests.support.repository import ROOT

PATIENCE = 8.0  # seconds for which groups wait
HERE = socket.gethostname()


@pytest.mark.parametrize(
    "begun,hung",
    [
        ({0: {"a": 5}, 1: {"a": 5}}, []),
        ({0: {"a": 5}, 1: {"a": 4}, 2: {"a": 5}}, [1]),
        ({0: {"a": 6}, 1: {"a": 4}, 2: {"a": 5}}, [1]),  # a broadcast: its source has passed, its leaf waits
        ({0: {"a": 4}, 1: {"a": 4}, 2: {"a": 5}}, [0, 1]),
        # Two tensor groups: rank 1 hangs, rank 0 waits for it in t, ranks 2 and 3 have passed and wait for both in a.
        ({0: {"a": 5, "t": 8}, 1: {"a": 5, "t": 7}, 2: {"a": 6, "u": 8}, 3: {"a": 6, "u": 8}}, [1]),
        ({0: {"": 3, "a": 4}, 1: {"": 2, "a": 4}}, [1]),  # makes a group that the other one does not make yet
    ],
)
def test_who_is_waited_for(begun, hung):
    assert waited_for(begun) == hung


def outcome(config, stage: str, rank: int, act: str, own_store: str = "") -> tuple[str, str, list[str]]:
    """Trains; ``rank`` hangs or dies when it comes to ``stage``. The error, its type and the warnings."""
    import fitv2_scale.train.loop as loop
    import fitv2_scale.train.setup as setup

    if own_store:  # on rank 0, as under srun
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
        os.environ["MASTER_PORT"] = own_store
        failures.ANSWER = presence.ANSWER = 3.0
    world._TIMEOUT = timedelta(seconds=PATIENCE)
    if os.environ["RANK"] == str(rank):
        presence._GRACE = 1.0
    module = loop if hasattr(loop, stage) else setup
    whole = getattr(module, stage)

    def disturbed(*args):
        if os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), getattr(signal, act)) if act.startswith("SIG") else time.sleep(1000)
        return whole(*args)

    setattr(module, stage, disturbed)
    warnings = logging.handlers.BufferingHandler(100)
    logging.getLogger().addHandler(warnings)
    try:
        return "ended", str(train(config)), []
    except Exception as error:
        return type(error).__name__, str(error), [record.getMessage() for record in warnings.buffer]


@pytest.mark.parametrize(
    "stage,rank,line",
    [
        ("read_data", 2, "loop.py:"),  # its dataset, its plan
        ("check_start", 0, "setup.py:"),  # what rank 0 does alone
    ],
)
def test_a_rank_that_hangs_before_there_is_an_attempt_is_named(tiny, stage, rank, line):
    ranks = Ranks(3, outcome, tiny(), stage, rank, "hangs")
    try:
        others = [ranks.result(other) for other in range(3) if other != rank]
        found = re.fullmatch(
            rf"rank {rank} on {HERE} has kept the others waiting for (\d+) s, in (.*); see .*", same(others)
        )
        assert found and int(found[1]) >= PATIENCE - 1 and found[2].startswith(line)
        (warning,) = [text for _, _, warnings in others for text in warnings if "waiting" in text]  # at half time
        assert warning.startswith(f"rank {rank} on {HERE} has kept the others waiting for ")
        assert ranks.exit_code(rank, 60) == 75  # nobody waits for it: it ends by itself
    finally:
        ranks.kill()


def same(others: list[tuple[str, str, list[str]]]) -> str:
    """The sentence that all others have."""
    ((kind, text),) = {(kind, text) for kind, text, _ in others}
    assert kind == "RanksMissing", text
    return text


def test_a_rank_that_is_killed_is_named(tiny):
    ranks = Ranks(3, outcome, tiny(), "read_data", 1, "SIGKILL")
    try:
        text = same([ranks.result(rank) for rank in (0, 2)])
        assert text.startswith(f"rank 1 on {HERE} has ended, was killed or does not answer any more, ")
    finally:
        ranks.kill()


@pytest.mark.parametrize("rank,what", [(0, ", or torchrun there, has ended"), (1, " has ended, was killed")])
def test_a_rank_that_is_stopped_is_named(tiny, rank, what):
    """Also the first one, whose process is the server by which the ranks tell each other."""
    ranks = Ranks(3, outcome, tiny(), "read_data", rank, "SIGSTOP", str(free_port()))
    try:
        text = same([ranks.result(other) for other in range(3) if other != rank])
        assert text.startswith(f"rank {rank} on {HERE}{what} or does not answer any more")
    finally:
        ranks.kill()


def command(words: list[str]) -> tuple[int, str]:
    """The exit code of a command on a rank, and what it prints; rank 1 hangs in it."""
    world._TIMEOUT = timedelta(seconds=PATIENCE)
    if os.environ["RANK"] == "1":
        world._meet = lambda *_: time.sleep(1000)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return main(words), said.getvalue()


def test_all_commands_of_several_ranks_name_one_that_hangs():
    config = str(ROOT / "configs/demo.yaml")
    commands = [["sample", "nowhere"], ["validate", "nowhere"], ["evaluate", "nowhere"], ["doctor"]]
    commands += [["bench", "step", config], ["train", config, "run=nowhere"]]
    started = [Ranks(2, command, words) for words in commands]
    try:
        for words, ranks in zip(commands, started, strict=True):
            code, said = ranks.result(0)
            assert code == 75 and f"fitv2: rank 1 on {HERE} has kept the others waiting for " in said, words
    finally:
        for ranks in started:
            ranks.kill()
