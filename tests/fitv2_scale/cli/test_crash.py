"""What kills a process leaves a word where its output goes."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from fitv2_scale.cli.__main__ import exit_code_of, main
from tests.support.repository import ROOT

SHORT_REPORT = ["shard", "verify", str(ROOT / "tests/fixtures/made_by_a2e80d5/dataset")]  # fits into the buffer
CUT = """
import os, sys
import numpy as np
from fitv2_scale.cli.__main__ import exit_code_of

def read_a_mapped_file_that_was_cut():
    column = np.load(sys.argv[1], mmap_mode="r")
    os.truncate(sys.argv[1], 128)
    return int(column.sum())

sys.exit(exit_code_of(read_a_mapped_file_that_was_cut))
"""


def test_a_mapped_file_that_was_cut_is_a_word_and_the_line_that_read_it(tmp_path):
    import numpy as np

    np.save(tmp_path / "column.npy", np.zeros(10_000))
    command = [sys.executable, "-c", CUT, str(tmp_path / "column.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr and "in read_a_mapped_file_that_was_cut" in done.stderr


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ESHUTDOWN])
def test_a_broken_pipe_that_is_not_that_of_standard_output_is_no_closed_pager(number):
    """Python has one class for both errnos; the second is also that of a file system which has evicted its client."""

    def fail() -> int:
        raise OSError(number, os.strerror(number), "/data/00000.tar.zst")

    with pytest.raises(BrokenPipeError, match="/data/00000.tar.zst"):
        exit_code_of(fail)


def test_a_report_that_finds_no_room_at_its_end_has_failed(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(SHORT_REPORT) == 2
    assert capsys.readouterr().err == "fitv2: standard output cannot be written: [Errno 28] No space left on device\n"


def test_a_report_whose_reader_is_gone_at_its_end_fails_without_a_word(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert main(SHORT_REPORT) == 1
    assert capsys.readouterr().err == ""
