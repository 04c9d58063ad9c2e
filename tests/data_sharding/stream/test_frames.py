"""Fetching frames: transient errors are retried until one deadline, others are raised at once, and no byte is used that
does not match its digest."""

import errno
import itertools
import os
import sys
import threading
import time

import pytest
from fsspec.registry import _registry

from data_sharding.errors import StorageDown, UserError
from data_sharding.format.manifest import Manifest
from data_sharding.storage import retry as retry_module
from data_sharding.storage.files import put, read
from data_sharding.storage.filesystems import Cancelled, file_system
from data_sharding.storage.retry import RetryPolicy
from data_sharding.stream import frames
from data_sharding.stream.frames import FrameReader, UnreadableFrame, fetch_frame, read_frame
from tests.support.fake_object_store import FakeStore, serve
from tests.support.faulty_disk import FaultyDisk

SHORT = RetryPolicy(deadline=0.6, attempt=0.2)
FOR_EVER = 1e6  # seconds that a test would hang if a read was not given up


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retry_module, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retry_module, "_LONGEST_PAUSE", 0.05)


@pytest.fixture
def manifest(dataset):
    manifest = Manifest.load(serve(dataset))
    FakeStore.reads = []
    return manifest


def test_one_ranged_read_fetches_a_frame(manifest):
    samples = read_frame(manifest, 1)
    assert [s.id for s in samples] == manifest.sample_id[slice(*manifest.frame_first[1:3])].tolist()
    ((path, start, end),) = FakeStore.reads
    assert path.endswith(".tar.zst") and end - start == manifest.frame_bytes[1]


@pytest.mark.parametrize(
    "fault",
    [
        OSError(16, "SlowDown"),
        ConnectionResetError(),
        PermissionError("ExpiredToken"),
        TimeoutError(),
        lambda body: body[:100],
        lambda body: body[:-1],
        lambda body: body + b"x",
        lambda body: body[:50] + bytes([body[50] ^ 1]) + body[51:],
        lambda body: b"",
        FOR_EVER,  # a stall
    ],
    ids=["busy", "reset", "refused", "timeout", "short", "a byte short", "long", "flipped", "empty", "stall"],
)
def test_transient_errors_are_retried(manifest, fault):
    FakeStore.faults = [fault, fault]
    policy = RetryPolicy(deadline=300, attempt=1.0 if fault is FOR_EVER else 100)
    whole = FakeStore.objects["set/shard-000000.tar.zst"][: int(manifest.frame_bytes[0])]
    assert fetch_frame(manifest, 0, policy) == whole
    assert len(FakeStore.reads) == 3


def test_a_missing_shard_is_not_retried(manifest):
    del FakeStore.objects["set/shard-000002.tar.zst"]
    with pytest.raises(UnreadableFrame, match="shard-000002.tar.zst, frame 2 .*the shard is missing"):
        fetch_frame(manifest, 2)
    assert [path for path, *_ in FakeStore.reads if path.endswith(".tar.zst")] == ["set/shard-000002.tar.zst"]


def test_if_the_manifest_is_missing_too_no_frame_is_lost(manifest):
    """As where a file system is not mounted any more, and its mount point is an empty folder."""
    FakeStore.objects = {}
    with pytest.raises(StorageDown, match="fake://set cannot be reached"):
        fetch_frame(manifest, 2)


def test_the_same_wrong_bytes_three_times_count_as_stored(manifest):
    FakeStore.forever = lambda body: bytes([body[0] ^ 1]) + body[1:]
    with pytest.raises(UnreadableFrame, match="frame 0 .*its bytes do not match their digest"):
        fetch_frame(manifest, 0)
    assert len(FakeStore.reads) == 3
    FakeStore.reads, FakeStore.forever = [], lambda body: body[:10]
    with pytest.raises(UnreadableFrame, match="frame 1 .*: 10 of its .* bytes were read"):
        fetch_frame(manifest, 1)
    assert len(FakeStore.reads) == 3


@pytest.mark.parametrize(("name", "place", "kind"), [
    ("EIO", "in the frame", UnreadableFrame), ("EUCLEAN", "in the frame", UnreadableFrame),
    ("EIO", "everywhere", StorageDown), ("ESHUTDOWN", "in the frame", StorageDown),
])  # fmt: skip
def test_a_bad_place_of_a_disk_is_an_unreadable_frame(dataset, monkeypatch, name, place, kind):
    """Unless the other end of the shard cannot be read either."""
    number, manifest, disk = getattr(errno, name), Manifest.load(dataset), FaultyDisk(monkeypatch)
    monkeypatch.setattr("data_sharding.storage.bad_places._SECONDS", 0.01)
    begin, size = int(manifest.frame_offset[1]), int(manifest.frame_bytes[1])
    # What a disk cannot read is a page at least: here one that ends with the frame.
    bad = range(begin + max(0, size - 4096), begin + size)
    disk.fail(number, ".tar.zst", "read", place=bad if place == "in the frame" else None)
    with pytest.raises((UnreadableFrame, StorageDown), match=os.strerror(number)) as found:
        fetch_frame(manifest, 1, RetryPolicy(deadline=0.02))
    assert found.type is kind


def test_an_outage_that_ends_while_another_place_is_asked_loses_no_frame(dataset, monkeypatch):
    manifest, disk, ask = Manifest.load(dataset), FaultyDisk(monkeypatch), frames.can_be_read
    disk.fail(errno.EIO, ".tar.zst", "read")

    def and_the_outage_is_over(*asked) -> bool:
        disk.points = ()
        return ask(*asked)

    monkeypatch.setattr(frames, "can_be_read", and_the_outage_is_over)
    with pytest.raises(StorageDown):
        fetch_frame(manifest, 1, RetryPolicy(deadline=0.02))


def test_storage_that_serves_no_shard_until_the_deadline_is_down(manifest):
    """The manifest can be read all the while: a busy server lets one request through and refuses the next."""
    FakeStore.forever = OSError(16, "SlowDown")
    began = time.monotonic()
    with pytest.raises(StorageDown, match="fake://set cannot be reached .*SlowDown, retried for 1 s"):
        fetch_frame(manifest, 0, SHORT)
    assert 0.3 < time.monotonic() - began < 1.5
    FakeStore.forever = FOR_EVER  # and if it hangs every time
    with pytest.raises(StorageDown, match="no answer within"):
        fetch_frame(manifest, 0, SHORT)
    assert time.monotonic() - began < 3


def test_other_wrong_bytes_each_time_are_an_unreadable_frame(manifest):
    bodies = itertools.count()
    FakeStore.forever = lambda body: next(bodies).to_bytes(4, "little") + body[4:]
    with pytest.raises(UnreadableFrame, match="frame 0 .*do not match their digest, retried for 1 s"):
        fetch_frame(manifest, 0, SHORT)


def test_if_nothing_answers_the_storage_is_down(manifest):
    FakeStore.forever, FakeStore.only = ConnectionRefusedError("refused"), ""
    with pytest.raises(StorageDown, match="fake://set cannot be reached .refused, retried for 1 s.: check"):
        fetch_frame(manifest, 0, SHORT)


def test_bugs_are_not_retried(manifest):
    FakeStore.faults = [TypeError("ours")]
    with pytest.raises(TypeError, match="ours"):
        fetch_frame(manifest, 0)
    assert len(FakeStore.reads) == 1


def test_a_cancelled_read_ends_at_once(manifest):
    FakeStore.forever = FOR_EVER
    policy = RetryPolicy(deadline=FOR_EVER, attempt=FOR_EVER)
    threading.Timer(0.2, policy.cancelled.set).start()
    with pytest.raises(Cancelled):
        FrameReader(policy).read(manifest, 0)


def test_a_refused_login_is_an_error_at_the_start(manifest):
    FakeStore.forever, FakeStore.only = PermissionError("InvalidAccessKeyId"), "manifest.json"
    with pytest.raises(UserError, match="access to fake://set/manifest.json is refused .InvalidAccessKeyId"):
        Manifest.load("fake://set")
    assert len(FakeStore.reads) == 1


def test_whole_files_are_retried_too(manifest, tmp_path):
    FakeStore.faults, FakeStore.only = [OSError(16, "SlowDown")] * 3, ""
    assert read("fake://set/manifest.json") == FakeStore.objects["set/manifest.json"]
    put(f"{tmp_path}/a/b", b"data")
    assert read(f"{tmp_path}/a/b") == b"data"
    with pytest.raises(FileNotFoundError):
        read(f"{tmp_path}/none")


def test_unknown_urls_and_missing_packages_are_one_sentence(monkeypatch):
    with pytest.raises(UserError, match="nope://x cannot be opened .*give a local path or an s3:// URL"):
        file_system("nope://x")
    # As where s3fs is not installed: fsspec remembers its class once any test has used it.
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    monkeypatch.setattr("data_sharding.storage.filesystems._connected", {})
    with pytest.raises(UserError, match=r"s3://b/x needs a package .*pip install -e '\.\[s3\]'"):
        file_system("s3://b/x")
