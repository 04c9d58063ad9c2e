"""The three logs of a run, on storage that keeps an entry and loses its reply: each entry is there once."""

import json
from collections.abc import Callable

import pytest

from data_sharding.errors import DataError
from data_sharding.format.manifest import Manifest
from data_sharding.storage.store import Store
from data_sharding.stream.substitutes import LostFrame, Substitutes
from fitv2_scale.run.log import RunLog
from fitv2_scale.run.substitutions import SubstitutionLog, substitution_records
from launchers.chain_log import ChainLog, verdict
from tests.support.scripted_store import ScriptedStore

Log = tuple[str, Callable[[str], object], Callable[[Store], list]]  # its folder; appends; reads all entries


def run_log(store: Store, dataset: str) -> Log:
    log = RunLog(store)
    log.claim()
    return "log", lambda word: log.commit(1, 10, word, "0c9d"), lambda store: RunLog(store).commits()


def substitutions(store: Store, dataset: str) -> Log:
    manifest = Manifest.load(dataset)
    log = SubstitutionLog(substitution_records(store), RunLog(store), 0, 0, 1.0, Substitutes([manifest]))

    def write(word: str) -> None:
        log.apply(log.write([LostFrame(0, log.substitutes.version, word)], 0))

    return "ledger", write, lambda store: substitution_records(store).entries()


STARTED = {"kind": "START", "restart": 0, "nodes": ["n1"], "commits": 0, "attempt": 1}


def chain_log(store: Store, dataset: str) -> Log:
    log = ChainLog(store)
    return "chain", lambda word: log.add(**STARTED, job=word), lambda store: ChainLog(store).records


@pytest.mark.parametrize("how", ["lost", "resent"])
@pytest.mark.parametrize("kind", [run_log, substitutions, chain_log])
def test_a_lost_reply_is_found_to_be_a_success(kind, how, dataset):
    store = ScriptedStore()
    folder, append, entries = kind(store, dataset)
    store.script = [how, "ok", how, how]
    for word in ("one", "two", "three", "four"):
        append(word)
    found = entries(store)
    assert len(found) == 4 and all(
        word in str(e) for word, e in zip(("one", "two", "three", "four"), found, strict=True)
    )
    nonces = {json.loads(data)["nonce"] for path, data in store.objects.items() if path.startswith(f"{folder}/")}
    assert len(nonces) == sum(path.startswith(f"{folder}/") for path in store.objects)


@pytest.mark.parametrize("kind", [run_log, substitutions, chain_log])
def test_a_request_that_failed_is_an_error_and_leaves_nothing(kind, dataset):
    store = ScriptedStore()
    _, append, entries = kind(store, dataset)
    store.script = ["failed"]
    with pytest.raises(TimeoutError, match="not sent"):
        append("one")
    assert entries(store) == []
    append("one")
    assert len(entries(store)) == 1


@pytest.mark.parametrize("how", ["lost", "resent"])
def test_a_lost_reply_is_no_fruitless_job(how):
    """Two jobs without a new commit are two, so that a chain which may have three continues."""
    store = ScriptedStore()
    chain = ChainLog(store)
    chain.add("SUBMIT", home="/runs/x/jobs/1a2b3c4d", log=0)
    for job in ("17", "18"):
        store.script = [how]
        chain.add(**STARTED, job=job)
    for seen in (chain, ChainLog(store)):
        assert verdict(seen.since_submit, [], steps=100, fruitless=3).event is None
    chain.add(**STARTED, job="19")
    assert verdict(chain.since_submit, [], steps=100, fruitless=3).event == "no-progress"


def test_a_record_of_before_there_were_nonces_is_read():
    store = ScriptedStore()
    record = {"kind": "SUBMIT", "time": "2025-06-01T12:00:00.000000+00:00", "home": "/runs/x/jobs/1a2b3c4d", "log": 2}
    store.create("chain/00000001", json.dumps(record).encode())
    chain = ChainLog(store)
    chain.add(**STARTED, job="1")
    assert [r["kind"] for r in ChainLog(store).records] == ["SUBMIT", "START"] and chain.submit["log"] == 2


def test_a_record_that_nobody_could_read_again_is_not_written():
    store = ScriptedStore()
    with pytest.raises(ValueError, match="home: field required"):
        ChainLog(store).add("SUBMIT", log=0)
    assert store.objects == {} and ChainLog(store).records == []


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b"{}", b'{"kind": "LOST"}', b'{"kind": "END", "job": "1"}'])
def test_a_damaged_record_of_the_chain_is_named(junk):
    store = ScriptedStore()
    store.create("chain/00000001", junk)
    with pytest.raises(DataError, match="chain/00000001 is not a record of the chain of jobs .*submit again"):
        ChainLog(store)
