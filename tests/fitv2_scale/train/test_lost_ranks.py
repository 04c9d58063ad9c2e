"""A rank that is killed tells nobody: those that are left name it, and not what their collective said."""

import contextlib
import io
import json
import os
import signal
import socket
from pathlib import Path

import pytest

from fitv2_scale.parallel.failures import is_broken_collective
from fitv2_scale.run.run import Run
from fitv2_scale.run.status import status
from fitv2_scale.train.loop import train
from fitv2_scale.train.lost_ranks import lost, refusing
from tests.support.ranks import Ranks
from tests.support.run_history import reach
from tests.support.tiny_runs import make_tiny


@pytest.mark.parametrize(
    "error,broken",
    [
        (RuntimeError("[/pytorch/third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1"), True),
        (RuntimeError("NCCL error in: x.cpp: remote process exited or there was a network error"), True),
        (RuntimeError("step 3: the ranks' images are not the planned ones"), False),
        (ConnectionResetError("connection reset by peer"), False),  # storage
    ],
)
def test_which_errors_are_those_of_a_collective(error, broken):
    assert is_broken_collective(error) == broken


def test_a_closed_port_is_noticed_and_an_open_one_is_left_alone():
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as lives,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dies,
    ):
        lives.bind(("127.0.0.1", 0))
        dies.bind(("127.0.0.1", 0))
        ports = {1: lives.getsockname(), 2: dies.getsockname()}
        assert refusing(lambda: ports, patience=0.3) == []
        dies.close()
        assert refusing(lambda: ports) == [2]


def test_what_is_said_of_lost_ranks(tmp_path):
    """A log is named only if there is one: a rank that was killed has seldom written anything."""
    say = "what its launcher and the system's log of its node say; then start again"
    one = lost({1: "n2"}, tmp_path)
    assert str(one) == f"rank 1 on n2 ended or was killed (out of memory?): see {say}" and one.ranks == (1,)
    (log := tmp_path / "rank-00001.log").touch()
    assert str(lost({1: "n2"}, tmp_path)) == str(one).replace("see what", f"see {log} and what")
    two = lost({9: "n2", 8: "n2"}, tmp_path)
    assert str(two).startswith("ranks 8-9 (n2) ended or were killed (out of memory?): see ") and two.ranks == (8, 9)


def train_and_say(config) -> tuple[int, str]:
    """Its exit code, and what it prints as an error."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return train(config), said.getvalue()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_by_the_others(dataset, tmp_path, killed):
    """All end with 75; the lowest of them says so in end.json. Stacks are in their logs alone."""
    config = make_tiny(dataset, tmp_path, train__steps=100_000, checkpoint__every_steps=50_000)
    ranks = Ranks(3, train_and_say, config)
    try:
        reach(config.run, 3, 1)
        ranks.signal(killed, signal.SIGKILL)
        named, printed = f"rank {killed} on {socket.gethostname()} ended or was killed (out of memory?): see ", []
        for rank in {0, 1, 2} - {killed}:
            code, said = ranks.result(rank, 60)
            assert code == 75 and "Traceback" not in said and "Connection" not in said
            printed += [line for line in said.splitlines() if line.startswith("rank")]
            log = Path(config.run, f"attempts/1/logs/rank-{rank:05d}.log").read_text()
            assert named in log and "Traceback" in log and "gloo" in log
        assert printed and all(line.startswith(named) for line in printed)
        assert f"rank-{killed:05d}.log" not in printed[0]
        end = json.loads(Path(config.run, "attempts/1/end.json").read_text())
        assert (end["code"], end["reason"], end["lost"]) == (75, printed[0], [killed])
        (attempt,) = status(Run.open(config.run))["attempts"]
        assert (attempt["code"], attempt["why"]) == (75, printed[0])
    finally:
        ranks.kill()


def failing(config) -> int:
    """A bug deep in the loader's thread of rank 1."""
    import data_sharding.format.shard as shard

    def planted_bug(*_):
        return 1 // 0

    if os.environ["RANK"] == "1":
        shard.RawFrame.view = planted_bug
    return train(config)


def test_a_bug_in_the_loader_keeps_its_traceback_where_it_arose(dataset, tmp_path):
    config = make_tiny(dataset, tmp_path)
    with pytest.raises(ZeroDivisionError):
        Ranks(2, failing, config).results()
    own, other = (Path(config.run, f"attempts/1/logs/rank-0000{rank}.log").read_text() for rank in (1, 0))
    assert "planted_bug" in own and "return 1 // 0" in own and "rank 1 failed" in own
    assert "rank 1" in other and "ZeroDivisionError" in other and "Read error" not in other
    end = json.loads(Path(config.run, "attempts/1/end.json").read_text())
    assert end["code"] == 1 and end["reason"].startswith("ZeroDivisionError")
    assert end["reason"].endswith(f"(rank 1 on {socket.gethostname()} raised this)")
