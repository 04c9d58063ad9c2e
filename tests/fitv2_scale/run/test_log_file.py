"""Every errno of errno.h on the log file of a rank: what it logs goes elsewhere, with the reason, and nothing ends."""

import errno
import logging

import pytest

from fitv2_scale.run.log_file import LogFile
from tests.support.faulty_disk import FaultyDisk


@pytest.mark.parametrize("point", ["open", "write"])
def test_what_cannot_be_written_goes_to_stderr_and_what_comes_later_to_the_file(tmp_path, monkeypatch, capsys, point):
    disk, log = FaultyDisk(monkeypatch), logging.Logger("a room")
    for number, code in errno.errorcode.items():
        disk.fail(0, "rank-")
        file = tmp_path / code / "logs" / "rank-00000.log"
        log.addHandler(handler := LogFile(file))
        if point == "write":
            log.warning("begun")
        disk.fail(number, "rank-", point)
        log.warning("lost %d", 1)
        log.warning("lost %d", 2)
        assert disk.met == 2, code
        reason, *lost = capsys.readouterr().err.splitlines()
        assert f"The log {file} cannot be written, its lines come here: [Errno {number}]" in reason
        assert lost == ["lost 1", "lost 2"], code
        disk.fail(0, "rank-")
        log.warning("well again")
        log.removeHandler(handler)
        handler.close()
        lines = [line.rpartition(": ")[2] for line in file.read_text().splitlines()]
        assert lines[-1] == "well again" and not any("lost" in line for line in lines)
    assert capsys.readouterr().err == ""
