"""Storage that lacks something: fsync of folders, flock, room, a bucket, an answer."""

import errno
import os
import stat

import pytest

from data_sharding.errors import StorageDown, UserError
from data_sharding.storage import retry as retry_module
from data_sharding.storage.atomic_write import destination
from data_sharding.storage.files import put, read
from data_sharding.storage.filesystems import disconnect
from data_sharding.storage.local_store import LocalStore
from data_sharding.storage.retry import RetryPolicy, retry_local
from data_sharding.stream.disk_cache import DiskCache
from data_sharding.write.begun import Options, begin
from tests.support.fake_object_store import FakeStore
from tests.support.faulty_disk import FaultyDisk


def refuse_folders(monkeypatch, number: int) -> None:
    fsync = os.fsync

    def act(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", act)


@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "EBADF", "ENOSYS"])
def test_folders_need_no_fsync(tmp_path, monkeypatch, name):
    refuse_folders(monkeypatch, getattr(errno, name))
    store = LocalStore(str(tmp_path / "run"))
    store.create("log/1", b"x")
    store.put("a/b/c", b"y")
    put(str(tmp_path / "d" / "e"), b"z")
    assert (store.read("log/1"), store.read("a/b/c"), read(str(tmp_path / "d" / "e"))) == (b"x", b"y", b"z")


def test_a_disk_that_cannot_keep_a_folder_is_trouble(tmp_path, monkeypatch):
    refuse_folders(monkeypatch, errno.EIO)
    with pytest.raises(StorageDown, match="cannot be reached: .*Input/output error"):
        LocalStore(str(tmp_path / "run"), RetryPolicy(deadline=0.01)).put("a", b"x")


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_without_flock_the_cache_warns_once_and_leaves_nothing(tmp_path, monkeypatch, caplog, name):
    FaultyDisk(monkeypatch).fail(getattr(errno, name), str(tmp_path), "flock")
    cache = DiskCache(str(tmp_path / "cache"), 1 << 20)
    for i in range(3):
        fetched = cache.get(f"{i:032x}", check=lambda data: None, fetch=lambda: b"frame", policy=RetryPolicy())
        assert fetched == b"frame"
    assert [r.message.endswith("frames are fetched without it") for r in caplog.records] == [True]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_full_disk_is_a_sentence_and_nothing_stays(tmp_path, monkeypatch):
    disk = FaultyDisk(monkeypatch)
    disk.fail(errno.ENOSPC, "shard-0", "write")
    with pytest.raises(StorageDown, match="shard-0 cannot be written: No space left on device; free some space"):
        put(str(tmp_path / "shard-0"), b"x")
    assert not list(tmp_path.iterdir())


def test_the_next_try_removes_what_a_killed_writer_left(tmp_path):
    options = Options("source", "codec", 16, 7, 0.0, "classes")
    begin(str(tmp_path), options, vae=False)
    left, other = tmp_path / ".shard-000000.tar.zst.0123456789abcdef.tmp", tmp_path / "unpacked.tar.0.tmp"
    left.touch()
    other.touch()  # an archive that another task unpacks
    begin(str(tmp_path), options, vae=False)
    assert not left.exists() and other.exists()
    assert destination(left) == tmp_path / "shard-000000.tar.zst" and destination(other) is None


def test_a_missing_bucket_is_a_sentence(monkeypatch):
    async def pipe_file(self, path, data, **options):
        raise FileNotFoundError(None)

    monkeypatch.setattr(FakeStore, "_pipe_file", pipe_file)
    with pytest.raises(UserError, match="fake://set/x cannot be written: there is no such bucket; create it first"):
        put("fake://set/x", b"")


def test_an_endpoint_without_a_scheme_is_a_sentence(monkeypatch):
    for name, value in {"ENDPOINT_URL": "127.0.0.1:9", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    disconnect()
    with pytest.raises(UserError, match="Invalid endpoint: 127.0.0.1:9.*needs a scheme as in http://"):
        read("s3://bucket/x")
    disconnect()


def test_silence_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(retry_module, "_SILENCE", 0.0)
    policy, calls = RetryPolicy(deadline=300.0), []

    def answer_at_last() -> str:
        calls.append(1)
        if len(calls) < 4:
            raise OSError(errno.ENOTCONN, "gone")
        return "here"

    monkeypatch.setattr(retry_module, "_LONGEST_PAUSE", 0.01)
    assert retry_local(policy, "/there", answer_at_last, writing=False) == "here"
    assert caplog.messages == ["no answer from /there ([Errno 107] gone); retrying until 300 s"]
