"""What kills a process leaves a word where its output goes."""

import signal
import subprocess
import sys

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
