"""Parts of an archive become one tar, and each byte of them is reported once."""

import errno
import gzip
import io
import re
import tarfile

import pytest

from data_sharding.errors import StorageDown, UserError
from data_sharding.write.archives import Archive, unpack
from tests.support.faulty_disk import FaultyDisk


def packed(seed: int) -> bytes:
    """A tar of a few files, compressed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for n in range(3):
            info = tarfile.TarInfo(f"{n}.bin")
            info.size = 5000
            tar.addfile(info, io.BytesIO(bytes((n * seed + i * i) % 251 for i in range(5000))))
    return gzip.compress(buffer.getvalue())


@pytest.fixture
def archive(tmp_path):
    data = packed(7)
    parts = [data[:100], data[100:101], data[101:]]
    for n, part in enumerate(parts):
        (tmp_path / f"part{n}").write_bytes(part)
    return Archive(
        "a.tar.gz", tuple((str(tmp_path / f"part{n}"), len(p)) for n, p in enumerate(parts)), f"{tmp_path}/a"
    )


def test_the_tar_is_whole_and_the_bar_full(archive, capsys):
    unpack([archive], workers=1, progress=True)
    with tarfile.open(archive.tar) as tar:
        assert tar.getnames() == ["0.bin", "1.bin", "2.bin"]
    assert re.search(r"(\S+k)/\1B unpacked", capsys.readouterr().err)
    unpack([archive], workers=1, progress=True)  # there already
    assert capsys.readouterr().err == ""


def test_a_part_that_is_missing_is_told(archive, tmp_path):
    (tmp_path / "part2").write_bytes(b"")
    with pytest.raises(UserError, match="a.tar.gz ends too early: its last part is missing or incomplete"):
        unpack([archive], workers=1, progress=False)


def test_a_disk_that_is_full_or_cannot_be_read_is_a_sentence(archive, tmp_path, monkeypatch):
    disk = FaultyDisk(monkeypatch)
    disk.fail(errno.ENOSPC, "a.0.tmp", "write")
    with pytest.raises(StorageDown, match="/a cannot be written: No space left on device; free some space there"):
        unpack([archive], workers=1, progress=False)
    disk.fail(errno.EIO, "part1", "read")
    with pytest.raises(StorageDown, match="/part1 cannot be reached: Input/output error; check the storage"):
        unpack([archive], workers=1, progress=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["part0", "part1", "part2"]
