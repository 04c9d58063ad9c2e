"""No thread of a rank ends in silence, and none is ended by what a stranger or a disk does."""

import logging
import socket
import threading
from pathlib import Path

from fitv2_scale.run.requests import Requests
from fitv2_scale.run.run import Run
from fitv2_scale.train.rank_log import log_to
from fitv2_scale.train.watchdog import Watchdog


def test_a_thread_that_dies_is_in_the_rank_log(tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "__excepthook__", lambda dead: None)  # pytest's own says it, too
    attempt = Run.open_or_create(str(tmp_path / "run"), {}, {}, None).claim({})
    with log_to(attempt, 3):
        thread = threading.Thread(target=lambda: 1 // 0, name="unlucky")
        thread.start()
        thread.join()
    text = Path(attempt.folder, "logs/rank-00003.log").read_text()
    assert "the thread unlucky died: ZeroDivisionError" in text and "1 // 0" in text


def test_a_log_that_cannot_be_opened_ends_nothing(tmp_path, capfd):
    attempt = Run.open_or_create(str(tmp_path / "run"), {}, {}, None).claim({})
    Path(attempt.folder, "logs/rank-00000.log").mkdir(parents=True)
    with log_to(attempt, 0):
        logging.getLogger("test").warning("a line")
        logging.getLogger("test").warning("another")
    said = capfd.readouterr().err
    assert "a line" in said and "another" in said
    assert said.count("rank-00000.log cannot be written, its lines come here: ") == 1 and "Is a directory" in said


def bare(kind: type, **fields):
    made = object.__new__(kind)
    made.__dict__.update(fields)
    return made


def test_what_strangers_send_to_the_watchdog_is_passed_over():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as port:
        port.bind(("127.0.0.1", 0))
        for datagram in (b"5", b"?", b"[1, 2]", b'{"a": 1}', b'["s", 5, 5]', b"\xff"):
            port.sendto(datagram, port.getsockname())
        watchdog = bare(Watchdog, _socket=port, _ended=threading.Event(), _secret="s")
        watchdog._listen(0.3)


def test_the_watchdog_and_the_requests_outlive_an_error(caplog):
    ended, looks = threading.Event(), []

    def fail() -> None:
        looks.append(1)
        if len(looks) == 3:
            ended.set()
        raise KeyError("unexpected")

    bare(Watchdog, _ended=ended, _interval=0.01, _look=fail)._watch()
    assert len(looks) == 3 and caplog.text.count("the watchdog failed: KeyError('unexpected')") == 3
    ended.clear()
    looks.clear()
    bare(Requests, _poll=0.01, _poll_once=fail).poll_until(ended)
    assert len(looks) == 3 and caplog.text.count("requests to stop or save cannot be read") == 1
