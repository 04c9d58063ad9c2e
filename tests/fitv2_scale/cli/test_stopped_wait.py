"""A signal that comes while `fitv2 train` waits for the other ranks ends it at once: it has nothing to save."""

import contextlib
import io
import os
import signal
import time

import pytest

from fitv2_scale.cli.__main__ import main
from tests.support.ranks import Ranks
from tests.support.repository import ROOT

LOST = "rank 1 has not joined the other one for"


def alone(words: list[str]) -> tuple[int, str]:
    """The exit code of the first of two ranks, and what it prints. The other one is never started."""
    os.environ["WORLD_SIZE"] = "2"
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as a shell starts it: these tests may run under nohup
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return main(words), said.getvalue()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_rank_that_waits_for_the_others_obeys(tmp_path, number):
    ranks = Ranks(1, alone, ["train", str(ROOT / "configs/demo.yaml"), f"run={tmp_path / 'run'}"])
    try:
        ranks.wait_until_joined(0)
        sent = time.monotonic()
        ranks.signal(0, number)
        code, printed = ranks.result(0, 60)
        assert code == 75 and time.monotonic() < sent + 10
        assert printed.startswith(f"fitv2: {number.name} came, and {LOST} ") and printed.count("\n") == 1
        assert printed.endswith(" s: nothing is lost, start again\n")
        assert not (tmp_path / "run").exists()
    finally:
        ranks.kill()


def test_a_rank_that_waits_to_tell_the_others_why_it_ends_says_so_itself():
    """Its config cannot be read. It is bad input, whether they come or not."""
    ranks = Ranks(1, alone, ["train", "none.yaml"])
    try:
        ranks.wait_until_joined(0)
        ranks.signal(0, signal.SIGTERM)
        code, printed = ranks.result(0, 60)
        assert code == 2 and printed.startswith("fitv2: cannot read the config") and printed.count("\n") == 1
    finally:
        ranks.kill()
