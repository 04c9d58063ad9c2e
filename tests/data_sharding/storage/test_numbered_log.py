"""A log of objects in a store, by itself: what is appended is what is read, in order and once."""

import json

import pytest

from data_sharding.errors import DataError
from data_sharding.storage.numbered_log import NumberedLog
from data_sharding.storage.open_store import open_store
from tests.support.scripted_store import ScriptedStore


def opened(folder, **options) -> NumberedLog:
    def parse(number: int, record: dict) -> tuple[int, str]:
        if not isinstance(record["word"], str):
            raise ValueError("word is no text")
        return number, record["word"]

    return NumberedLog(open_store(str(folder)), "log", parse, noun="note", remedy="restore it", **options)


def test_entries_are_numbered_from_one(tmp_path):
    one, other = opened(tmp_path), opened(tmp_path)
    assert one.append(lambda before, nonce: {"word": "a", "nonce": nonce}) == [(1, "a")]
    assert other.append(lambda before, nonce: {"word": f"b{len(before)}", "nonce": nonce}) == [(1, "a"), (2, "b1")]
    assert one.append(lambda before, nonce: {"word": f"c{before[-1][0]}", "nonce": nonce})[-1] == (3, "c2")
    assert other.entries() == one.entries() == opened(tmp_path).entries()
    assert sorted(file.name for file in (tmp_path / "log").iterdir()) == ["00000001", "00000002", "00000003"]
    assert one.append(lambda before, nonce: None) == one.entries()


def test_an_entry_is_read_once_and_an_own_one_never(monkeypatch):
    store, asked = ScriptedStore(), []
    monkeypatch.setattr(store, "read", lambda path: asked.append(path) or ScriptedStore.read(store, path))
    log, other = (NumberedLog(store, "log", lambda n, record: n, noun="note", remedy="restore it") for _ in range(2))
    for _ in range(2):
        log.append(lambda before, nonce: {"nonce": nonce})
    assert asked == ["log/00000001", "log/00000002"]  # where nothing was
    asked.clear()
    assert log.entries() == other.entries() == other.entries() == [1, 2]
    assert asked == [f"log/{number:08d}" for number in (3, 1, 2, 3, 3)]


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    log = opened(tmp_path)
    with pytest.raises(ValueError, match="word is no text"):
        log.append(lambda before, nonce: {"word": 3, "nonce": nonce})
    assert log.entries() == [] and not (tmp_path / "log").exists()


@pytest.mark.parametrize("data", [b"[]", b"{", json.dumps({"word": 1}).encode(), b"{}"])
def test_a_damaged_entry_is_named(tmp_path, data):
    opened(tmp_path).append(lambda before, nonce: {"word": "a", "nonce": nonce})
    (tmp_path / "log/00000002").write_bytes(data)
    with pytest.raises(DataError, match=f"^{tmp_path}/log/00000002 is not a note .*: restore it"):
        opened(tmp_path).entries()


def test_an_entry_that_is_missing_before_others_is_found(tmp_path):
    log = opened(tmp_path)
    for word in "abc":
        log.append(lambda before, nonce, word=word: {"word": word, "nonce": nonce})
    opened(tmp_path).require_whole()
    (tmp_path / "log/00000002").unlink()
    with pytest.raises(DataError, match="00000002 is missing, though there are entries up to 3"):
        opened(tmp_path).require_whole()
