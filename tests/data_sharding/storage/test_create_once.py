"""A file that is created at most once: all who race for it find the same."""

import errno
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from data_sharding.storage.files import create_once
from tests.support.faulty_disk import FaultyDisk


def test_all_that_race_find_what_one_has_written(tmp_path):
    writers, together = 8, Barrier(8)

    def write(number: int) -> bytes:
        together.wait()
        return create_once(str(tmp_path / "new/record"), b"%d" % number)

    with ThreadPoolExecutor(writers) as pool:
        found = set(pool.map(write, range(writers)))
    assert found == {(tmp_path / "new/record").read_bytes()}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["record"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_without_hard_links_the_first_is_kept_all_the_same(tmp_path, monkeypatch, number):
    FaultyDisk(monkeypatch).fail(number, "record", "link")
    assert create_once(str(tmp_path / "record"), b"a") == b"a"
    assert create_once(str(tmp_path / "record"), b"b") == b"a" == (tmp_path / "record").read_bytes()
