"""What the launcher decides, without Slurm: tables of cases."""

import json
import math

import pytest

from data_sharding.errors import UserError
from data_sharding.storage.local_store import LocalStore
from fitv2_scale.config.slurm import SlurmConfig
from fitv2_scale.run.log import LogEntry
from fitv2_scale.run.run import NOT_FINITE, Run
from launchers.chain import Chain, node_count
from launchers.chain_log import ChainLog, nodes_to_exclude, signal_seconds, verdict
from launchers.hostlist import counts, expand
from launchers.slurm import is_usable
from launchers.submit import parse_nodes


@pytest.mark.parametrize(
    "short,names",
    [
        ("n1", ["n1"]),
        ("n[07-09,12],m3", ["n07", "n08", "n09", "n12", "m3"]),
        ("r[1-2]n[8-9]-ib", ["r1n8-ib", "r1n9-ib", "r2n8-ib", "r2n9-ib"]),
        ("a,b[3]", ["a", "b3"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_names_of_nodes(short, names):
    assert expand(short) == names


def test_counts_of_tasks():
    assert counts("8(x3),4") == [8, 8, 8, 4] and counts("1") == [1]


SUBMIT = {"kind": "SUBMIT", "home": "/runs/x/jobs/1a2b3c4d", "log": 2}


def start(commits: int, job: str = "1") -> dict:
    return {"kind": "START", "job": job, "restart": 0, "nodes": ["n1"], "commits": commits, "attempt": 1}


def end(code: int, blamed=(), time: str = "2025-06-01T12:00:00.000000+00:00", job: str = "1") -> dict:
    return {
        "kind": "END",
        "job": job,
        "restart": 0,
        "code": code,
        "reason": "why",
        "blamed": list(blamed),
        "time": time,
    }


def log(*kinds: str) -> list[LogEntry]:
    """Entries of these kinds; ``COMMIT 20`` is one of step 20."""
    made = []
    for n, (kind, _, number) in enumerate((k.partition(" ") for k in kinds), 1):
        fields = {"COMMIT": {"step": int(number or 0)}, "RETIRE": {"entry": int(number or 0)}}.get(kind, {})
        made.append(LogEntry(n, kind, 1, "", "", fields))
    return made


@pytest.mark.parametrize(
    "records,entries,event",
    [
        ([SUBMIT], [], None),
        ([SUBMIT, start(0)], ["CLAIM"], None),
        ([SUBMIT, start(0), end(75)], ["CLAIM", "COMMIT 7"], None),
        ([SUBMIT, start(0), end(1)], ["CLAIM"], None),  # a bug may be a node's fault
        ([SUBMIT, start(0), end(0)], ["CLAIM", "COMMIT 100"], "done"),
        ([SUBMIT], ["CLAIM", "COMMIT 100"], "done"),
        ([SUBMIT], ["CLAIM", "COMMIT 100", "RETIRE 2"], None),  # it was found damaged
        ([SUBMIT, start(0), end(2)], ["CLAIM"], "bad-input"),
        ([SUBMIT, start(0), end(93)], ["CLAIM"], "gave-up"),
        ([SUBMIT, start(0), end(93) | {"reason": f"{NOT_FINITE} in 20 steps in a row"}], ["CLAIM"], "not-finite"),
        ([SUBMIT, start(0), end(2), SUBMIT], ["CLAIM"], None),  # it was mended
        ([SUBMIT], ["CLAIM", "STOP"], None),  # taken back by this submission
        ([SUBMIT], ["CLAIM", "COMMIT 7", "STOP"], "stopped"),
        ([SUBMIT], ["CLAIM", "COMMIT 7", "STOP", "CLAIM"], "stopped"),  # came while a job was starting
        ([SUBMIT, start(1), start(1), start(1)], ["CLAIM", "COMMIT 7"], "no-progress"),
        ([SUBMIT, start(1), end(75), start(1), end(75), start(1), end(75)], ["CLAIM", "COMMIT 7"], "no-progress"),
        ([SUBMIT, start(0), start(0), start(1)], ["CLAIM", "COMMIT 7"], None),
        ([SUBMIT, start(0), start(0), SUBMIT, start(0)], ["CLAIM"], None),
    ],
)
def test_what_becomes_of_a_chain(records, entries, event, tmp_path):
    history = ChainLog(LocalStore(str(tmp_path)))
    for record in records:
        history.add(**record)
    assert verdict(history.since_submit, log(*entries), steps=100, fruitless=3).event == event
    assert ChainLog(LocalStore(str(tmp_path))).records == history.records  # as the next job reads it


def test_the_end_of_an_older_job_is_not_the_new_chains(tmp_path):
    history = ChainLog(LocalStore(str(tmp_path)))
    for record in (SUBMIT, start(0, "1"), SUBMIT, end(93, job="1")):
        history.add(**record)
    assert verdict(history.since_submit, log("CLAIM"), steps=100, fruitless=3).event is None


def test_two_writers_of_the_history_lose_nothing(tmp_path):
    first, second = ChainLog(LocalStore(str(tmp_path))), ChainLog(LocalStore(str(tmp_path)))
    first.add(**start(0, "1"))
    second.add(**start(0, "2"))
    assert [r["job"] for r in second.records] == [r["job"] for r in ChainLog(LocalStore(str(tmp_path))).records]
    assert len(second.records) == 2


@pytest.mark.parametrize(
    "blamed,usable,least,names",
    [
        ([["n1"]], 4, 2, ["n1"]),
        ([["n1"], ["n2"]], 4, 2, ["n1", "n2"]),
        ([["n1"], ["n2"], ["n3"]], 4, 2, ["n2", "n3"]),  # two must be left: the oldest comes back
        ([["n1", "n2"]], 2, 2, []),
        ([["gone"]], 2, 2, ["gone"]),  # costs nothing
    ],
)
def test_nodes_that_failed_are_avoided_if_enough_are_left(blamed, usable, least, names):
    records = [end(75, nodes) for nodes in blamed]
    nodes = [f"n{i + 1}" for i in range(usable)]
    assert nodes_to_exclude(records, nodes, least, 120, "2025-06-01T13:59:00.000000+00:00") == names
    assert nodes_to_exclude(records, nodes, least, 120, "2025-06-01T14:01:00.000000+00:00") == []  # forgotten


def test_the_signal_comes_early_enough(tiny, tmp_path):
    """300 s before the limit, or twice what the newest attempt that has saved was seen to need."""
    run = Run.open_or_create(str(tmp_path / "run"), {}, {}, None)
    assert signal_seconds(run, 0) == 300
    run.claim({}).record_pace(1.2, 20.0)
    assert signal_seconds(run, 0) == 300
    run.claim({}).record_pace(30.25, 170.0)
    run.claim({})  # has not saved yet
    assert signal_seconds(run, 0) == 401 and signal_seconds(run, 60) == 60


def test_a_chain_of_before_its_signal_was_recorded(tmp_path):
    chain = Chain("RUN", "n", str(tmp_path), 10, 1, 1, 1, "", 3, 1.0, "", False)
    chain.save()
    record = json.loads((tmp_path / "chain.json").read_text())
    del record["signal_seconds"]
    (tmp_path / "chain.json").write_text(json.dumps(record))
    assert Chain.load(tmp_path) == chain and chain.signal_seconds == 0


def test_numbers_of_nodes():
    assert parse_nodes("4") == (4, 4) and parse_nodes("2-4") == (2, 4)
    for wrong in ("0", "4-2", "-1", "many", "2-", ""):
        with pytest.raises(UserError, match="--nodes"):
            parse_nodes(wrong)
    assert [node_count(usable, 2, 4) for usable in (0, 2, 3, 9)] == [2, 2, 3, 4]


def test_time_limits():
    limits = {"90": 5400, "90:30": 5430, "2:00:30": 7230, "1-0": 86400, "1-12:30": 131400, "2-00:00:05": 172805}
    limits |= {"": math.inf, "UNLIMITED": math.inf, "0": math.inf, "0:00:00": math.inf}
    assert {limit: SlurmConfig(walltime=limit).walltime_seconds for limit in limits} == limits


def test_states_of_nodes():
    usable = ["idle", "allocated", "mixed", "completing", "idle~", "planned", "allocated+"]
    assert all(map(is_usable, usable))
    unusable = ["down", "down*", "idle*", "drained", "draining", "failing", "maint", "unknown*", "inval"]
    assert not any(map(is_usable, unusable))
