"""What training says of its way to MLflow: what can never work, once, and with the remedy."""

import contextlib
import io
from types import SimpleNamespace

import torch

import fitv2_scale.train.setup as setup
from data_sharding.errors import StorageDown
from fitv2_scale.train.loop import DONE, train
from fitv2_scale.train.recorder import RankZeroRecorder
from tests.support.ranks import run_ranks


def train_with_news(config, news: list[list[str]]) -> tuple[int, str]:
    """Exit code and what is printed; ``news`` is what the uploader has to tell at each step."""
    setup.Uploader = lambda *_: SimpleNamespace(check=lambda: news.pop(0) if news else [])
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        return train(config), printed.getvalue()


def test_what_keeps_metrics_from_mlflow_is_printed_once(tiny):
    config = tiny(train__steps=4, tracking__uri="htp://h:5000")
    later = "MLflow at htp://h:5000 failed, the journal keeps the data: restore the experiment"
    ((code, printed),) = run_ranks(1, train_with_news, config, [[], [later]])
    assert code == DONE
    said = [line.partition(",")[0] for line in printed.splitlines() if "htp:" in line]
    assert said == [
        "nothing is published to MLflow: tracking.uri=htp://h:5000 begins with htp:",
        "MLflow at htp://h:5000 failed",
    ]


def test_a_picture_that_cannot_be_drawn_or_stored_ends_nothing(caplog):
    stored, journal = [], []

    def put(path: str, png: bytes) -> None:
        if png == b"unwanted":
            raise StorageDown("no answer")
        stored.append((path, png))

    def without_memory() -> bytes:
        raise torch.OutOfMemoryError("CUDA out of memory")

    attempt = SimpleNamespace(run=SimpleNamespace(store=SimpleNamespace(put=put)))
    recorder = RankZeroRecorder(attempt, SimpleNamespace(picture=lambda step, path: journal.append((step, path))), list)
    for step, draw in enumerate((without_memory, lambda: b"unwanted", lambda: b"png")):
        recorder.picture(step, draw)
    assert stored == [("samples/00000002.png", b"png")] and journal == [(2, "samples/00000002.png")]
    assert caplog.messages == [
        "the pictures of step 0 could not be drawn: CUDA out of memory",
        "the pictures of step 1 could not be stored: no answer",
    ]
