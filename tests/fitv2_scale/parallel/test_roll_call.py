"""Ranks that never join are named by the others, each of which ends with one and the same sentence."""

import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from data_sharding.errors import RanksMissing
from fitv2_scale.cli.__main__ import exit_code_of
from fitv2_scale.parallel import group_store
from fitv2_scale.parallel.group_store import open_group_store
from fitv2_scale.parallel.rank_names import guess_nodes, name_ranks
from fitv2_scale.parallel.roll_call import _give_up, call_roll
from tests.services.ports import free_port


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


def called(
    server: dist.TCPStore,
    rank: int,
    size: int,
    patience: float,
    views: str = "a",
    noted: Callable[[], str | None] = lambda: None,
) -> RanksMissing | tuple[str, bool]:
    """What ``rank`` is told, or raises. Two ranks a node; ``views`` has a letter for the view of each rank."""
    store = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    try:
        return call_roll(store, rank, size, f"n{rank // 2}", patience, views[rank % len(views)], noted)
    except RanksMissing as error:
        return error


def together(
    server: dist.TCPStore, ranks: list[int], size: int, patience: float, views: str = "a"
) -> list[RanksMissing | tuple[str, bool]]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda rank: called(server, rank, size, patience, views), ranks))


def test_when_all_come_it_returns(server):
    assert together(server, list(range(6)), 6, 60.0) == [("n0", True)] * 6


@pytest.mark.parametrize("views,alike", [("aaaa", True), ("baaa", False), ("aaab", False), ("abcd", False)])
def test_all_know_whether_all_have_the_same_view(server, views, alike):
    assert together(server, list(range(4)), 4, 60.0, views) == [("n0", alike)] * 4


@pytest.mark.parametrize(
    "there,size,who",
    [
        ([0, 1, 3], 4, "rank 2 (n1) has not joined the other 3 for 3 s"),
        ([1, 2, 3], 4, "rank 0 (n0) has not joined the other 3 for 3 s"),
        ([0, 4], 8, "ranks 1-3, 5-7 (n0, n1, n2, n3) have not joined the other 2 for 3 s"),
        ([1], 2, "rank 0 (n0) has not joined the other one for 3 s"),
    ],
)
def test_who_is_missing_is_named(server, monkeypatch, caplog, there, size, who):
    monkeypatch.setenv("FITV2_NODES", ",".join(f"n{node}:2" for node in range(size // 2)))
    with caplog.at_level(logging.WARNING):
        found = together(server, there, size, 3.0)
    assert {str(error).partition(":")[0] for error in found} == {who}
    assert len({str(error) for error in found}) == 1 and "start again" in str(found[0])
    printed = [error.said_by(rank) for rank, error in zip(there, found, strict=True)]
    assert 1 <= len([said for said in printed if said]) <= 2  # where it was found, and by rank 0
    said, warned = [record.getMessage() for record in caplog.records]  # one rank says it, after a quarter and a half
    assert said == who.replace("3 s", "1 s; waiting") and warned == who.replace("3 s", "2 s; waiting for as long again")
    # Who comes now is not left waiting for ranks that have ended.
    late = next(rank for rank in range(size) if rank not in there)
    assert str(called(server, late, size, 60.0)) == str(found[0])


def test_a_signal_on_one_rank_ends_the_wait_of_all(server):
    """None of them is left to wait for one that has gone."""
    hear = lambda: "SIGTERM" if server.add("fitv2/joined", 0) == 2 else None  # noqa: E731
    with ThreadPoolExecutor(2) as pool:
        other, heard = pool.map(
            lambda rank: called(server, rank, 4, 600.0, "a", hear if rank else lambda: None), [0, 3]
        )
    pattern = r"SIGTERM came, and ranks 1-2 have not joined the other 2 for \d s: nothing is lost, start again"
    assert re.fullmatch(pattern, str(heard)) and str(other) == str(heard)
    assert [heard.said_by(3), other.said_by(0)] == [str(heard), f"rank 3 on n1: {heard}"]
    assert str(called(server, 1, 4, 600.0)) == str(heard)  # it comes late


def test_a_signal_that_comes_when_all_are_there_is_left_to_training(server):
    assert together(server, [0, 1], 2, 60.0) == [("n0", True)] * 2
    assert _give_up(server, "rank 0 on n0", 2, 1.0, "SIGTERM") == "all"
    assert called(server, 0, 1, 60.0, "a", lambda: "SIGTERM") == ("n0", True)


@pytest.fixture
def nobody(monkeypatch) -> int:
    """The port of a server that nobody has started."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port := free_port()))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


def opened(patience: float, noted: Callable[[], str | None] = lambda: None) -> int:
    """The exit code of a command that waits for it."""

    def act() -> int:
        open_group_store(1, 2, patience, noted)
        raise AssertionError("there is a server")

    return exit_code_of(act)


def test_a_server_that_nobody_has_started_is_named(nobody, monkeypatch, capsys, caplog):
    monkeypatch.setattr(group_store, "SOON", 0.1)
    assert opened(1.0) == 75  # another attempt may find it
    assert f"fitv2: rank 1 has not reached rank 0 at 127.0.0.1:{nobody} for 1 s: see" in capsys.readouterr().err
    assert [record.getMessage() for record in caplog.records] == [f"rank 1 waits for rank 0 at 127.0.0.1:{nobody}"]


def test_a_signal_ends_the_wait_for_a_server(nobody, capsys, caplog):
    began = time.monotonic()
    assert opened(10.0, lambda: "SIGHUP") == 75 and time.monotonic() < began + 5
    sentence = f"SIGHUP came while rank 1 waited for rank 0 at 127.0.0.1:{nobody}: nothing is lost, start again"
    assert capsys.readouterr().err == f"fitv2: {sentence}\n" and not caplog.records


@pytest.mark.parametrize(
    "known,told,local,expected",
    [
        ({}, "a:2,b:2", 1, ["a", "a", "b", "b"]),
        ({0: "a", 3: "b"}, "a:2,b:2", 1, ["a", "a", "b", "b"]),
        ({0: "a", 1: "b"}, "a:2,b:2", 2, ["a", "b", None, None]),  # dealt in turn: the plan does not hold
        ({0: "a", 3: "b"}, "", 2, ["a", "a", "b", "b"]),  # beside a rank of the same node
        ({0: "a", 3: "b"}, "", 1, ["a", None, None, "b"]),
        ({0: "a", 1: "b"}, "", 4, ["a", "b", None, None]),  # beside ranks of two nodes
        ({0: "a"}, "a:2", 4, ["a"] * 4),  # told of another number of ranks
    ],
)
def test_where_a_rank_is_that_has_said_nothing(known, told, local, expected):
    assert guess_nodes(known, told, local, 4) == expected


def test_names_of_ranks():
    assert name_ranks([5, 3, 4, 0], ["a", "a", "a", "b", "b", None]) == "ranks 0, 3-5 (a, b)"
    assert name_ranks([5], [None] * 6) == "rank 5"
