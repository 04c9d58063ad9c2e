"""Every errno of errno.h on every kind of read and write: it continues, is trouble of the storage (then training
saves and ends with 75), or is one sentence."""

import errno
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from data_sharding.format.columns import read_column
from data_sharding.format.manifest import Manifest
from data_sharding.storage import files
from data_sharding.storage import retry as retry_module
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.numbered_log import NumberedLog
from data_sharding.storage.retry import CorruptRead, RetryPolicy
from data_sharding.stream.disk_cache import DiskCache
from data_sharding.stream.frames import fetch_frame
from tests.support.errnos import ALL_CONTINUE, READS, WRITES, kind_of, outcome
from tests.support.faulty_disk import FaultyDisk

BRIEF = RetryPolicy(deadline=0.001, attempt=0.001)

TABLE = {
    "a frame": READS | {"missing": "lost", "name": "lost", "refused": "down"},
    "the manifest": READS | {"missing": "sentence"},
    "a column": READS | {"missing": "sentence"},
    "an object": READS,
    "an object's size": READS,
    "an object that could be read": READS | {"refused": "down"},
    "a log's entries": READS | {"missing": "continues"},  # an entry that is not there is the end
    "a whole file": WRITES,
    "a file created once": WRITES,
    "put": WRITES,
    "put where could be written": WRITES | {"refused": "down"},
    "append to a log": WRITES,
    "a stream": WRITES,
    "the cache": ALL_CONTINUE,
}


@dataclass
class Place:
    """Where the operations act; ``disk`` is what fails."""

    disk: FaultyDisk
    folder: Path
    manifest: Manifest

    @property
    def store(self) -> LocalStore:
        return LocalStore(str(self.folder / "run"), BRIEF)


def read_frame(place: Place) -> None:
    fetch_frame(place.manifest, 1, BRIEF)


def read_manifest(place: Place) -> None:
    Manifest.load(place.manifest.url)


def read_label(place: Place) -> None:
    header = place.manifest.header
    read_column(place.manifest.url, "label", header.columns["label.npy"], header.totals, "")


def read_object(place: Place) -> None:
    assert place.store.read("there") == b"x"


def size_of_object(place: Place) -> None:
    assert place.store.size("there") == 1


def read_twice(place: Place) -> None:
    store = place.store
    number, place.disk.left = place.disk.left, 0
    store.read("there")
    place.disk.left = number
    store.read("there")


def log_of(store: LocalStore) -> NumberedLog:
    return NumberedLog(store, "log", lambda n, record: record, noun="entry", remedy="restore it")


def read_log(place: Place) -> None:
    log_of(place.store).entries()


def append(place: Place) -> None:
    (place.folder / "run" / "log" / "00000002").unlink(missing_ok=True)
    log_of(place.store).append(lambda before, nonce: {"nonce": nonce})


def put_whole_file(place: Place) -> None:
    files.put(str(place.folder / "whole"), b"x")


def create_file(place: Place) -> None:
    (place.folder / "once").unlink(missing_ok=True)
    assert files.create_once(str(place.folder / "once"), b"x") == b"x"


def put_object(place: Place) -> None:
    place.store.put("sub/put", b"x")


def put_twice(place: Place) -> None:
    store = place.store
    number, place.disk.left = place.disk.left, 0
    store.put("sub/put", b"x")
    place.disk.left = number
    store.put("sub/put", b"x")


def stream(place: Place) -> None:
    with place.store.writing("sub/stream", 1) as file:
        file.write(b"x")


def use_cache(place: Place) -> None:
    def check(data: bytes) -> None:
        if data != b"frame":
            raise CorruptRead("wrong", "")

    cache, digest = DiskCache(str(place.folder / "cache"), 1 << 20), secrets.token_hex(16)
    for _ in range(2):  # the second time from the disk, if it could be stored
        assert cache.get(digest, check=check, fetch=lambda: b"frame", policy=BRIEF) == b"frame"


# (operation, part of the paths that fail, points at which they do)
CASES: list[tuple[str, Callable[[Place], None], str, list[str]]] = [
    ("a frame", read_frame, ".tar.zst", ["open", "read"]),
    ("the manifest", read_manifest, "manifest.json", ["open", "read"]),
    ("a column", read_label, "label.npy", ["open", "read"]),
    ("an object", read_object, "there", ["open", "read"]),
    ("an object's size", size_of_object, "there", ["stat"]),
    ("an object that could be read", read_twice, "there", ["open", "read"]),
    ("a log's entries", read_log, "log/0000", ["open", "read"]),
    ("a whole file", put_whole_file, "whole", ["open", "write", "fsync", "replace"]),
    ("a file created once", create_file, ".once", ["open", "write", "fsync"]),
    ("put", put_object, "sub/", ["open", "write", "fsync", "replace"]),
    ("put where could be written", put_twice, "sub/", ["open", "write", "fsync", "replace"]),
    ("append to a log", append, ".00000002", ["open", "write", "fsync"]),
    ("a stream", stream, "sub/", ["open", "write", "fsync", "replace"]),
    ("the cache", use_cache, "cache/", ["open", "read", "write", "stat", "replace", "flock"]),
]


@pytest.fixture
def place(dataset, tmp_path, monkeypatch) -> Iterator[Place]:
    monkeypatch.setattr(retry_module, "_FIRST_PAUSE", 0.0001)
    monkeypatch.setattr(retry_module, "_LONGEST_PAUSE", 0.0002)
    for name in ("_WHOLE_FILE", "_CALL", "_LOCAL"):
        monkeypatch.setattr(files, name, replace(getattr(files, name), deadline=BRIEF.deadline))
    monkeypatch.setattr("data_sharding.stream.frames._PROBE", BRIEF.deadline)
    monkeypatch.setattr("data_sharding.storage.bad_places._SECONDS", BRIEF.deadline)
    monkeypatch.setattr("data_sharding.stream.disk_cache._USAGE_WAIT", 0.001)
    place = Place(FaultyDisk(monkeypatch), tmp_path, Manifest.load(dataset))
    place.store.put("there", b"x")
    place.store.put_json("log/00000001", {"nonce": "0"})
    yield place


@pytest.mark.parametrize(("name", "act", "part", "points"), CASES, ids=[case[0] for case in CASES])
def test_what_each_errno_comes_to(place, name, act, part, points):
    wrong = {}
    for point in points:
        for number, code in errno.errorcode.items():
            place.disk.fail(number, part, point)
            found = outcome(lambda: act(place))
            if place.disk.met == 0 or found != TABLE[name][kind_of(number)]:
                wrong[code, point] = found if place.disk.met else "not met"
            place.disk.fail(0, part)
    assert not wrong


WAITING = [case for case in CASES if case[0] not in ("the cache", "a stream")]


@pytest.mark.parametrize(("name", "act", "part", "points"), WAITING, ids=[case[0] for case in WAITING])
def test_trouble_that_passes_is_waited_for(place, name, act, part, points, monkeypatch):
    """Twice an error, then none. A stream has begun, so it cannot be repeated: the next save is; the cache waits for
    nothing."""
    patient = RetryPolicy(deadline=60.0)
    monkeypatch.setattr("tests.data_sharding.storage.test_errno.BRIEF", patient)
    for policy in ("_WHOLE_FILE", "_CALL", "_LOCAL"):
        monkeypatch.setattr(files, policy, replace(getattr(files, policy), deadline=60.0))
    for point in points:
        for number in errno.errorcode if point == points[0] else (errno.ESHUTDOWN, errno.ENOTCONN, errno.EIO):
            if TABLE[name][kind_of(number)] == "down" and kind_of(number) not in ("full", "exists"):
                place.disk.fail(number, part, point, times=2)
                assert (number, point, outcome(lambda: act(place))) == (number, point, "continues")
                assert place.disk.met == 2
