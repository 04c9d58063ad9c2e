"""The folder of a job's files that cannot be written: one sentence."""

import errno

import pytest

from data_sharding.errors import UserError
from launchers.submit import write_home
from tests.support.faulty_disk import FaultyDisk


@pytest.mark.parametrize(
    "number,part,said",
    [
        (errno.ENOSPC, "/code/fitv2_scale/data.py", "the code cannot be copied to .*/code: .*No space left on device"),
        (errno.ENOSPC, "/home/config.yaml", "home cannot be written: No space left on device; free some space there"),
        (errno.EACCES, "/home/config.yaml", "home cannot be used: Permission denied; check who owns it"),
    ],
)
def test_a_home_that_cannot_be_written_is_a_sentence(tiny, tmp_path, monkeypatch, number, part, said):
    FaultyDisk(monkeypatch).fail(number, part, "open")
    with pytest.raises(UserError, match=said):
        write_home(tmp_path / "home", tiny(), "run")


def test_a_home_below_a_file_is_a_sentence(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/home/code cannot be used: Not a directory"):
        write_home(tmp_path / "file/home", tiny(), "run")
