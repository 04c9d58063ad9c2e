"""What happens when nobody reads what is printed, or it finds no room: real processes, pipes, devices and terminals."""

import os
import pty
import subprocess
import sys

import pytest

WORK = """
import sys, threading
from data_sharding.standard_streams import dropping, reporting, ReaderGone
from data_sharding.errors import UserError
def work():
    for line in range(300):
        print("out", line, flush=True)
        print("x" * 100, file=sys.stderr)
"""
LONG = (
    WORK
    + """
with dropping():
    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    open(sys.argv[1], "w").write("done")
sys.exit(75)
"""
)
REPORT = (
    WORK
    + """
with reporting():
    try:
        work()
    except ReaderGone:
        sys.exit(1)
    except UserError as error:
        open(sys.argv[1], "w").write(str(error))
        sys.exit(2)
"""
)


def started(code: str, argument: object, **streams) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, str(argument)], **streams)


def unread_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    theirs, ours = pty.openpty()
    os.close(theirs)
    return ours


def full_device() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("sink", [unread_pipe, closed_terminal, full_device])
def test_what_a_long_job_cannot_print_does_not_end_it(tmp_path, sink):
    """Its exit code is its own: Python's is 120 where it cannot write what is buffered."""
    lost = sink()
    job = started(LONG, tmp_path / "done", stdout=lost, stderr=lost)
    assert (job.wait(60), (tmp_path / "done").read_text()) == (75, "done")


def test_what_can_be_printed_is(tmp_path):
    job = started(LONG, tmp_path / "done", stdout=unread_pipe(), stderr=subprocess.PIPE)
    assert job.communicate()[1].count(b"x" * 100 + b"\n") == 600 and job.returncode == 75


def test_a_report_ends_quietly_when_its_reader_has_seen_enough(tmp_path):
    job = started(REPORT, tmp_path / "error", stdout=unread_pipe(), stderr=subprocess.PIPE)
    said = job.communicate()[1]
    assert b"Traceback" not in said and b"Exception" not in said
    assert job.returncode == 1 and not (tmp_path / "error").exists()


def test_a_report_that_finds_no_room_fails_with_a_sentence(tmp_path):
    job = started(REPORT, tmp_path / "error", stdout=full_device(), stderr=subprocess.PIPE)
    assert job.wait(60) == 2
    assert (tmp_path / "error").read_text().startswith("standard output cannot be written: [Errno 28]")


def test_standard_error_alone_ends_no_report(tmp_path):
    job = started(REPORT, tmp_path / "error", stdout=subprocess.PIPE, stderr=unread_pipe())
    assert job.communicate()[0].count(b"out") == 300 and job.returncode == 0


def test_a_file_never_takes_the_number_of_a_stream_that_was_closed(tmp_path):
    """What a library prints to descriptor 2 would go into it."""
    code = """
import os, sys
from data_sharding.standard_streams import reporting
with reporting():
    file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
    os.write(2, b"a warning of a library")
    print("text", file=sys.stderr)
    sys.exit(file if file > 2 else 1)
"""
    words = [sys.executable, "-c", code, str(tmp_path / "data")]
    closed = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *words])
    assert closed.returncode > 2 and (tmp_path / "data").read_bytes() == b""
