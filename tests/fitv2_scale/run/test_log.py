"""The log: unique numbers, unique attempts, no commit by a stale attempt, whatever the store does to a request."""

import json
import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sharding.errors import DataError, UserError
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.open_store import open_store
from fitv2_scale.run.log import RunLog, StaleAttempt, newest_attempt
from tests.support.scripted_store import ScriptedStore

DIGEST = "sha256:00"


def kinds(log: RunLog) -> list[tuple[int, str, int]]:
    return [(e.n, e.kind, e.attempt) for e in log.entries()]


def test_entries_are_numbered_objects_as_documented():
    store = ScriptedStore()
    log = RunLog(store)
    attempt = log.claim().attempt
    log.commit(attempt, 100, "steps/100", DIGEST)
    assert sorted(store.objects) == ["log/00000001", "log/00000002"]
    record = json.loads(store.objects["log/00000002"])
    assert {k: record[k] for k in ("n", "kind", "attempt", "step", "path", "manifest")} == {
        "n": 2, "kind": "COMMIT", "attempt": 1, "step": 100, "path": "steps/100", "manifest": DIGEST,
    }  # fmt: skip
    assert RunLog(store).entries() == log.entries()


def test_a_request_that_failed_is_an_error_and_leaves_nothing():
    store = ScriptedStore(["ok", "failed"])
    log = RunLog(store)
    log.claim()
    with pytest.raises(TimeoutError, match="not sent"):
        log.commit(1, 10, "steps/10", DIGEST)
    assert kinds(RunLog(store)) == [(1, "CLAIM", 1)]


def test_a_claim_that_loses_its_number_becomes_the_newer_attempt():
    store = ScriptedStore(["raced"])
    store.rival = lambda: RunLog(store).claim()
    assert RunLog(store).claim().attempt == 2
    assert kinds(RunLog(store)) == [(1, "CLAIM", 1), (2, "CLAIM", 2)]


def test_a_commit_that_races_a_newer_claim_is_stale_and_writes_nothing():
    store = ScriptedStore(["ok", "raced"])
    store.rival = lambda: RunLog(store).claim()
    log = RunLog(store)
    log.claim()
    with pytest.raises(StaleAttempt, match="attempt 1 was superseded by attempt 2"):
        log.commit(1, 10, "steps/10", DIGEST)
    assert kinds(RunLog(store)) == [(1, "CLAIM", 1), (2, "CLAIM", 2)]


def test_a_newer_claim_is_found_behind_entries_of_outsiders():
    store = ScriptedStore()
    old, new = RunLog(store), RunLog(store)
    old.claim()
    RunLog(store).stop()
    new.claim()
    RunLog(store).stop()
    with pytest.raises(StaleAttempt):
        old.commit(1, 10, "steps/10", DIGEST)
    with pytest.raises(StaleAttempt):
        commit = new.commit(2, 10, "steps/10", DIGEST)
        old.retire(1, commit.n)


def test_a_stop_that_takes_the_number_is_stepped_over():
    store = ScriptedStore(["ok", "raced"])
    store.rival = lambda: RunLog(store).stop()
    log = RunLog(store)
    log.claim()
    assert log.commit(1, 10, "steps/10", DIGEST).n == 3


def test_stop_is_in_force_until_the_next_claim():
    log = RunLog(ScriptedStore())
    assert not log.stop_requested()
    log.claim()
    assert not log.stop_requested()
    log.stop()
    log.commit(1, 10, "steps/10", DIGEST)  # the attempt saves, then ends
    assert log.stop_requested()
    log.claim()
    assert not log.stop_requested()


def test_commits_leaves_out_the_retired():
    log = RunLog(ScriptedStore())
    log.claim()
    first, second = (log.commit(1, step, f"steps/{step}", DIGEST) for step in (10, 20))
    log.retire(1, second.n)
    again = log.commit(1, 20, "steps/20", DIGEST)
    assert log.commits() == [first, again]
    with pytest.raises(ValueError, match="log entry 1 is not a COMMIT"):
        log.retire(1, 1)


@pytest.mark.parametrize(
    "junk", [b"", b"{", b"[]", b'{"n": 7}', b'{"n":1,"kind":"COMMIT","attempt":1,"nonce":"0","time":""}']
)
def test_a_damaged_entry_is_named(junk):
    store = ScriptedStore()
    store.objects["log/00000001"] = junk
    with pytest.raises(DataError, match="log/00000001 is not a log entry"):
        RunLog(store).entries()


@pytest.mark.parametrize("attempt,is_damaged", [(1, False), (2, True), (2**31, True)])
def test_an_attempt_that_cannot_be_the_entrys_is_damage(attempt, is_damaged):
    """The first entry is at most of attempt 1: each attempt begins with an entry of its own."""
    store = ScriptedStore()
    entry = {"n": 1, "kind": "CLAIM", "attempt": attempt, "nonce": "0", "time": "2026-01-01T00:00:00+00:00"}
    store.objects["log/00000001"] = json.dumps(entry).encode()
    if is_damaged:
        with pytest.raises(DataError, match=f"it says attempt={attempt}, but 1 entries are at most 1 attempts"):
            RunLog(store).entries()
    else:
        assert newest_attempt(RunLog(store).entries()) == 1


def assert_sound(log: RunLog) -> None:
    """No commit by a stale attempt, and claims count up by one: what the log exists for."""
    newest = 0
    for entry in log.entries():
        if entry.kind == "CLAIM":
            assert entry.attempt == newest + 1
            newest = entry.attempt
        elif entry.kind == "COMMIT":
            assert entry.attempt == newest, f"entry {entry.n} is a commit by attempt {entry.attempt}, newest {newest}"


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["claim", "commit", "stop"])), max_size=25),
    st.lists(st.sampled_from(["ok", "ok", "lost", "resent", "failed"]), max_size=40),
)
def test_any_interleaving_with_any_faults_is_sound(acts, script):
    store = ScriptedStore(script)
    logs, attempts = [RunLog(store) for _ in range(3)], [0, 0, 0]
    acknowledged = []
    for who, act in acts:
        try:
            if act == "claim":
                attempts[who] = logs[who].claim().attempt
            elif act == "stop":
                logs[who].stop()
            elif attempts[who]:
                acknowledged.append(logs[who].commit(attempts[who], len(acknowledged), "steps/x", DIGEST))
        except (StaleAttempt, TimeoutError):
            continue
    assert_sound(RunLog(store))
    written = [e for e in RunLog(store).entries() if e.kind == "COMMIT"]
    assert written == acknowledged  # a success is never reported twice, nor lost, nor hidden by an error


def test_threads_race_on_the_local_store(tmp_path):
    """Eight writers claim, commit and claim again on real files, each with its own view of the log."""
    begin, commits, stale = threading.Barrier(8), [], []

    def write(who: int) -> None:
        log = RunLog(LocalStore(str(tmp_path)))
        begin.wait()
        for turn in range(3):
            attempt = log.claim().attempt
            try:
                for i in range(3):
                    commits.append(log.commit(attempt, i, f"steps/{who}-{turn}-{i}", DIGEST))
            except StaleAttempt:
                stale.append(attempt)

    threads = [threading.Thread(target=write, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log = RunLog(LocalStore(str(tmp_path)))
    entries = log.entries()
    assert sorted(os.listdir(tmp_path / "log")) == [f"{n:08d}" for n in range(1, len(entries) + 1)]
    assert_sound(log)
    assert len([e for e in entries if e.kind == "CLAIM"]) == 24
    assert sorted(e.n for e in entries if e.kind == "COMMIT") == sorted(e.n for e in commits)
    assert stale, "the race never happened: this test shows nothing"


def test_store_create_is_conditional_and_put_is_not(tmp_path):
    store = LocalStore(f"file://{tmp_path}/run")
    store.create("a/b", b"first")
    with pytest.raises(FileExistsError):
        store.create("a/b", b"second")
    assert store.read("a/b") == b"first"
    store.put("a/b", b"third")
    assert store.read("a/b") == b"third"
    assert os.listdir(tmp_path / "run" / "a") == ["b"]  # no temporary file stays
    with pytest.raises(FileNotFoundError):
        store.read("a/c")


def test_store_lists_by_prefix_and_deletes_trees(tmp_path):
    store = LocalStore(str(tmp_path))
    for path in ("steps/1/a", "steps/1/b", "steps/10/a", "log/1"):
        store.put(path, b"")
    (tmp_path / "steps" / ".x.123.tmp").write_bytes(b"left by a killed process")
    assert store.list("steps/1") == ["steps/1/a", "steps/1/b", "steps/10/a"]
    assert store.list("steps/1/") == ["steps/1/a", "steps/1/b"]
    assert store.exists("steps/1/a") and not store.exists("steps/1")
    store.delete_tree("steps/1")
    store.delete_tree("steps/1")
    assert store.list("") == ["log/1", "steps/10/a"]


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x"])
def test_store_keeps_to_its_folder(tmp_path, path):
    with pytest.raises(ValueError, match="is outside of the store"):
        LocalStore(str(tmp_path)).delete_tree(path)
    with pytest.raises(ValueError, match="refusing"):
        LocalStore(str(tmp_path)).delete_tree("")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://bucket", "names no folder in the bucket"),
        ("http://h/run", "a file:/// URL or an s3:// URL"),
        ("file://h/run", "file:/// URL"),
    ],
)
def test_store_refuses_what_it_cannot_do(url, says):
    with pytest.raises(UserError, match=says):
        open_store(url)


def test_store_without_hard_links_says_so(tmp_path, monkeypatch):
    def no_link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(UserError, match="no hard links"):
        LocalStore(str(tmp_path)).create("log/1", b"")
