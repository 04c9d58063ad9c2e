"""Requests to a running attempt, as rank 0 sees them."""

import json
import os
from pathlib import Path

import pytest

from fitv2_scale.run.requests import Requests
from fitv2_scale.run.run import RETRY, Run


class Exited(Exception):
    pass


def test_a_stop_at_once_ends_the_process_and_says_so(tmp_path, monkeypatch):
    def leave(code: int) -> None:
        raise Exited(code)

    run = Run.open_or_create(str(tmp_path / "run"), {}, {}, None)
    attempt = run.claim({})
    requests = Requests(run, attempt.number)
    run.log.stop(at_once=True)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Exited, match=str(RETRY)):
        requests._poll_once()
    end = json.loads(Path(attempt.folder, "end.json").read_text())
    assert (end["code"], end["reason"]) == (75, "STOP: at once, without saving")


def test_a_stop_is_seen_once_it_is_there(tmp_path):
    run = Run.open_or_create(str(tmp_path / "run"), {}, {}, None)
    requests = Requests(run, run.claim({}).number)
    requests._poll_once()
    assert not requests.stop and requests.saves == 0
    run.log.stop(at_once=False)
    requests._poll_once()
    assert requests.stop
