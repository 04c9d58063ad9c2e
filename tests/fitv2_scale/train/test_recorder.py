"""What training says of its way to MLflow: what can never work, once, and with the remedy."""

import contextlib
import io
from types import SimpleNamespace

import fitv2_scale.train.setup as setup
from fitv2_scale.train.loop import DONE, train
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
