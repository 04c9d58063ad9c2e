"""The store behind a run, on local disk and on a real S3 server."""

import os

import pytest

from data_sharding.storage import s3_store
from data_sharding.storage.open_store import open_store


@pytest.fixture
def store(request, location):
    return open_store(location(request.param)[1]("store"))


both = pytest.mark.parametrize("store", ["local", pytest.param("s3", marks=pytest.mark.s3)], indirect=True)


@both
def test_whole_objects(store):
    assert not store.exists("a/b") and store.list("") == store.list("a/") == []
    store.create("a/b", b"first")
    with pytest.raises(FileExistsError):
        store.create("a/b", b"second")
    assert store.read("a/b") == b"first" and store.size("a/b") == 5
    store.put("a/b", b"third")
    assert store.read("a/b") == b"third" and store.read_range("a/b", 1, 3, bytes) == b"hi"
    with pytest.raises(FileNotFoundError):
        store.read("a/c")
    with pytest.raises(FileNotFoundError):
        store.size("a")
    for path in ("a/10", "a/1/x", "a/1/y"):
        store.put(path, b"")
    assert store.read("a/10") == b""
    assert store.list("a/1") == ["a/1/x", "a/1/y", "a/10"] and store.list("a/1/") == ["a/1/x", "a/1/y"]
    store.delete_tree("a/1")
    store.delete_tree("a/1")
    assert store.list("") == ["a/10", "a/b"]


@both
@pytest.mark.parametrize("size", [0, 1, 5 << 20, (5 << 20) + 1, 17_000_001])
def test_objects_written_piece_by_piece(store, size, monkeypatch):
    monkeypatch.setattr(s3_store, "PART", 5 << 20)
    data = os.urandom(size)
    with store.writing("x", size) as file:
        for at in range(0, size, 3_000_001):
            file.write(memoryview(data)[at : at + 3_000_001])
    assert store.read("x") == data and not store.uploads()


def test_a_growing_file_is_given_to_the_disk_as_it_grows(tmp_path):
    """Every 16 MiB, the last bytes included."""
    with open_store(str(tmp_path)).writing("x", 17 << 20) as file:
        file.write(bytes((16 << 20) - 100))
        file.write(bytes(100))
        (growing,) = tmp_path.iterdir()
        assert growing.stat().st_size == 16 << 20
        file.write(bytes(100))
        assert growing.stat().st_size == 16 << 20


@both
def test_an_unfinished_object_does_not_exist(store, monkeypatch):
    monkeypatch.setattr(s3_store, "PART", 5 << 20)
    store.put("x", b"old")
    with pytest.raises(KeyboardInterrupt), store.writing("x", 20 << 20) as file:
        file.write(bytes(12 << 20))
        raise KeyboardInterrupt
    assert store.read("x") == b"old" and store.list("") == ["x"] and not store.uploads()
