"""The node's disk cache: shared, bounded, and harmless, whatever was killed, damaged or full."""

import fcntl
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import xxhash

from data_sharding.storage.filesystems import Cancelled
from data_sharding.storage.retry import CorruptRead, RetryPolicy
from data_sharding.stream import disk_cache
from data_sharding.stream.disk_cache import DiskCache, _acquire
from tests.support.waiting import wait

SIZE = 4000
FOR_EVER = RetryPolicy(attempt=1e6)  # a test that waits for the holder would hang
_spawn = multiprocessing.get_context("spawn")


def frame(i: int) -> tuple[str, bytes]:
    data = random.Random(i).randbytes(SIZE)
    return xxhash.xxh3_128_hexdigest(data), data


def get(
    cache: DiskCache,
    i: int,
    fetched: list | None = None,
    policy: RetryPolicy | None = None,
    meanwhile: Callable[[], object] = lambda: None,
):
    """``meanwhile`` is called while it is fetched."""
    digest, data = frame(i)

    def check(found: bytes) -> None:
        if xxhash.xxh3_128_hexdigest(found) != digest:
            raise CorruptRead("wrong", "")

    def fetch() -> bytes:
        meanwhile()
        if fetched is not None:
            fetched.append(i)
        return data

    assert cache.get(digest, check=check, fetch=fetch, policy=policy or RetryPolicy()) == data


def files(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"*/*.{kind}"))


def test_a_frame_is_fetched_once_and_found_again(tmp_path):
    fetched: list[int] = []
    get(DiskCache(str(tmp_path), 1 << 20), 1, fetched)
    get(DiskCache(str(tmp_path), 1 << 20), 1, fetched)
    assert fetched == [1] and len(files(tmp_path, "frame")) == 1
    assert not files(tmp_path, "lock") and not files(tmp_path, "tmp")


def test_many_threads_that_want_one_frame_fetch_it_once(tmp_path):
    cache, fetched = partial(DiskCache, str(tmp_path), 1 << 20), []
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: get(cache(), 7, fetched, FOR_EVER, lambda: time.sleep(0.1)), range(16)))
    assert fetched == [7]


def _reader(folder: str, frames: range, log: str, seconds: float, limit: int) -> None:
    cache, order = DiskCache(folder, limit), list(frames)
    random.Random(os.getpid()).shuffle(order)
    for i in order:
        fetched: list[int] = []
        get(cache, i, fetched, FOR_EVER, lambda: time.sleep(seconds))
        with open(log, "a") as file:
            file.write("".join(f"{i}\n" for i in fetched))


def test_processes_share_it(tmp_path):
    log = tmp_path / "log"
    processes = [
        _spawn.Process(target=_reader, args=(str(tmp_path / "c"), range(20), str(log), 0.01, 1 << 20)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(map(int, log.read_text().split())) == list(range(20))


def test_a_killed_holder_blocks_nobody(tmp_path):
    folder = tmp_path / "c"
    holder = _spawn.Process(target=_reader, args=(str(folder), range(1), str(tmp_path / "log"), 1000, 1 << 20))
    holder.start()
    wait("the holder's lock", lambda: files(folder, "lock"))
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert files(folder, "lock")  # what it left behind
    files(folder, "lock")[0].with_suffix(".tmp").write_bytes(b"half a frame")
    fetched: list[int] = []
    get(DiskCache(str(folder), 1 << 20), 0, fetched, FOR_EVER)
    assert fetched == [0]
    assert not files(folder, "lock") and not files(folder, "tmp")


def test_a_lock_on_a_removed_file_does_not_count(tmp_path, monkeypatch):
    """Between open and flock the former holder may remove the file; the lock must be on the file that is there."""
    flock, path = fcntl.flock, tmp_path / "x.lock"
    races = [path.unlink, path.touch]

    def racing(file: int, operation: int) -> None:
        if races:
            races.pop(0)()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", racing)
    file = _acquire(path, 1, None)
    assert os.path.samestat(os.fstat(file), os.stat(path))
    assert _acquire(path, 0, None) is None  # and nobody else has it
    os.close(file)


def test_waiting_for_a_stopped_holder_ends(tmp_path):
    cache, fetched = DiskCache(str(tmp_path), 1 << 20), []
    with holding(cache, 3, fetched):
        get(cache, 3, fetched, RetryPolicy(attempt=0.1))
        assert fetched == [3]
    assert fetched == [3, 3] and len(files(tmp_path, "frame")) == 1


def test_waiting_ends_when_it_is_cancelled(tmp_path):
    cache, policy = DiskCache(str(tmp_path), 1 << 20), RetryPolicy(attempt=1e6)
    with holding(cache, 3):
        threading.Timer(0.1, policy.cancelled.set).start()
        with pytest.raises(Cancelled):
            get(cache, 3, policy=policy)


@contextmanager
def holding(cache: DiskCache, i: int, fetched: list | None = None) -> Iterator[None]:
    """While another thread holds the lock of frame ``i``, fetching it."""
    begun, over = threading.Event(), threading.Event()
    slow = threading.Thread(target=get, args=(cache, i, fetched, None, lambda: begun.set() or over.wait()))
    slow.start()
    begun.wait()
    try:
        yield
    finally:
        over.set()
        slow.join()


@pytest.mark.parametrize("damage", [b"", b"x" * SIZE, b"short"])
def test_a_damaged_file_is_a_miss(tmp_path, damage):
    cache, fetched = DiskCache(str(tmp_path), 1 << 20), []
    get(cache, 5, fetched)
    files(tmp_path, "frame")[0].write_bytes(damage)
    get(cache, 5, fetched)
    get(cache, 5, fetched)
    assert fetched == [5, 5]


def test_a_fetch_that_fails_leaves_nothing(tmp_path):
    cache = DiskCache(str(tmp_path), 1 << 20)
    with pytest.raises(ConnectionError):
        cache.get("0" * 32, check=lambda data: None, fetch=_fail, policy=RetryPolicy())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def _fail() -> bytes:
    raise ConnectionError


def test_it_never_exceeds_its_bound_and_evicts_the_least_recently_used(tmp_path):
    (tmp_path / "mine.frame").write_bytes(b"not the cache's")
    cache, fetched = DiskCache(str(tmp_path), 20 * SIZE), []
    for i in range(20):
        get(cache, i, fetched)
        time.sleep(0.002)
    get(cache, 0)  # used again: it must outlive 1
    for i in range(20, 26):
        get(cache, i, fetched)
        assert sum(path.stat().st_size for path in files(tmp_path, "frame")) <= 20 * SIZE
    kept = {path.stem for path in files(tmp_path, "frame")}
    assert frame(0)[0] in kept and frame(1)[0] not in kept and {frame(i)[0] for i in range(20, 26)} <= kept
    assert (tmp_path / "mine.frame").exists()
    get(DiskCache(str(tmp_path), SIZE - 1), 40)  # larger than the whole cache: passed through
    assert frame(40)[0] not in {path.stem for path in files(tmp_path, "frame")}


def test_eviction_breaks_no_reader(tmp_path):
    """Readers of 40 frames through a cache of 10, all evicting one another's."""
    with ThreadPoolExecutor(8) as pool:
        cache = DiskCache(str(tmp_path), 10 * SIZE)
        list(pool.map(lambda i: get(cache, i % 40), range(600)))
    assert 0 < sum(path.stat().st_size for path in files(tmp_path, "frame")) <= 10 * SIZE


def test_the_bound_holds_when_writers_are_slow_and_others_evict(tmp_path, monkeypatch):
    """Three frames are written for as long as 37 others are stored; each must count when it appears."""
    go_on, slow = threading.Event(), {frame(i)[0] for i in range(3)}
    plain = disk_cache.temporary_file

    @contextmanager
    def temporary_file(path, temporary):
        with plain(path, temporary) as opened:
            if path.stem in slow:
                go_on.wait()
            yield opened

    monkeypatch.setattr(disk_cache, "temporary_file", temporary_file)
    cache = DiskCache(str(tmp_path), 10 * SIZE)
    with ThreadPoolExecutor(3) as pool:
        late = [pool.submit(get, cache, i) for i in range(3)]
        try:
            for i in range(3, 40):
                get(cache, i)
        finally:
            go_on.set()
        for writer in late:
            writer.result()
    assert slow & {path.stem for path in files(tmp_path, "frame")}
    assert sum(path.stat().st_size for path in files(tmp_path, "frame")) <= 10 * SIZE


def test_a_frame_appears_while_the_usage_is_locked(tmp_path, monkeypatch):
    """Else an eviction between count and rename would forget it."""
    rename, free = os.replace, []

    def renamed(old, new):
        with disk_cache._locked(tmp_path / "usage", 0, None) as file:
            free.append(file is not None)
        rename(old, new)

    monkeypatch.setattr(os, "replace", renamed)
    get(DiskCache(str(tmp_path), 10 * SIZE), 1)
    assert free == [False] and len(files(tmp_path, "frame")) == 1


def test_without_a_usable_disk_frames_are_still_fetched(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    fetched: list[int] = []
    cache = DiskCache(str(tmp_path / "file" / "cache"), 1 << 20)
    for _ in range(2):
        get(cache, 1, fetched)
    assert fetched == [1, 1]
    assert len([r for r in caplog.records if "cannot be used" in r.message]) == 1


def test_kill_at_any_moment(tmp_path):
    """Processes that fill and evict are killed again and again; what is left is always whole and within the bound."""
    folder, log, rng = tmp_path / "c", tmp_path / "log", random.Random(0)
    for _ in range(4):
        args = (str(folder), range(60), str(log), 0.01, 20 * SIZE)
        processes = [_spawn.Process(target=_reader, args=args) for _ in range(2)]
        log.write_bytes(b"")
        for process in processes:
            process.start()
        wait("the first frame", lambda: log.stat().st_size)
        time.sleep(rng.uniform(0, 0.4))
        for process in processes:
            process.kill()
            process.join()
    for path in files(folder, "frame"):
        assert xxhash.xxh3_128_hexdigest(path.read_bytes()) == path.stem
    cache = DiskCache(str(folder), 20 * SIZE)
    for i in range(60):
        get(cache, i)
        assert sum(path.stat().st_size for path in files(folder, "frame")) <= 20 * SIZE
    assert len(files(folder, "frame")) > 10 and not files(folder, "tmp")
